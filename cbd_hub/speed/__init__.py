"""How fast models answer on this machine: measured, kept, and predicted for sizes in between."""
