"""The commands of `cbd`: parse, call, print."""
