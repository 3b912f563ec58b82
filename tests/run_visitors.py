"""Twenty visitors at once, as a process of their own: asks a page until the time is over, stops some turns, and prints what happened as JSON."""

import json
import sys
import threading
import time

from gradio_client import Client


VISITORS = 20


class Visitor(threading.Thread):
    """One who asks again and again; every fourth one stops what they asked for as soon as something is written."""

    def __init__(self, number, address, end, sizes):
        super().__init__()
        self.number, self.address, self.end, self.sizes = number, address, end, sizes
        self.tally, self.wrong, self.stopped, self.turns, self.glances = {"done": 0, "busy": 0, "stopped": 0}, [], {}, [], []

    def run(self):
        client = None
        turn = 0
        while time.monotonic() < self.end:
            turn += 1
            try:
                client = client or Client(self.address, verbose=False, ssl_verify=False)  # no certificates are read for a plain address: that is half of a call's work
                self.ask(client, 100 * turn + self.number, self.sizes[(self.number + turn) % len(self.sizes)])
            except Exception as error:
                if "busy" in str(error).lower() or "queue is full" in str(error).lower():
                    self.tally["busy"] += 1
                    time.sleep(0.5)
                else:
                    self.wrong.append(f"{type(error).__module__}.{type(error).__name__}: {error}"[:300])

    def ask(self, client, seed, size):
        asked = time.monotonic()
        job = client.submit(size, f"visitor {self.number} says", 0.8, 0.9, 48, seed, api_name="/generate")
        if self.number % 4 == 0:
            while not job.done() and not any(state["state"] == "writing" for state in job.outputs()):
                time.sleep(0.02)
            if not job.done():
                self.stopped[seed] = time.monotonic()
                job.cancel()
                self.tally["stopped"] += 1
                return
        job.result(timeout=240)
        self.tally["done"] += 1
        self.turns.append(time.monotonic() - asked)
        glance = time.monotonic()
        client.predict("max", api_name="/describe")
        self.glances.append(time.monotonic() - glance)


def main(address, seconds, sizes):
    end = time.monotonic() + seconds
    visitors = [Visitor(number, address, end, sizes) for number in range(VISITORS)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    print(json.dumps({  # noqa: T201
        "tally": {name: sum(visitor.tally[name] for visitor in visitors) for name in ("done", "busy", "stopped")},
        "wrong": [why for visitor in visitors for why in visitor.wrong],
        "stopped": {seed: asked for visitor in visitors for seed, asked in visitor.stopped.items()},
        "turns": sorted(took for visitor in visitors for took in visitor.turns), "glances": sorted(took for visitor in visitors for took in visitor.glances),
    }))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3].split(","))
