"""A small completions server on 127.0.0.1 that answers from a decoder, as vLLM's answers: `echo`, `logprobs`, ids."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from llmkit.decoder.generate import generate


class Completions:
    """What it answers with, and what it was asked.

    Attributes:
        faults: called with the body of a request; what it returns (status, document) is sent instead, if not None.
        most: prompts are cut to their last tokens beyond it.
        has_echo: prompts come back with their log-probabilities.
    """

    def __init__(self, decoder, tokenizer, eos, name="served"):
        self.decoder, self.tokenizer, self.eos, self.name = decoder, tokenizer, eos, name
        self.faults = lambda body: None
        self.most = 10**9
        self.has_echo = True
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    def complete(self, body):
        choices = []
        for index, ids in enumerate(body["prompt"]):
            ids = ids[-self.most :]
            (new,) = generate(self.decoder, [ids], max_new_tokens=body["max_tokens"], eos=self.eos)
            choice = {"index": index, "text": self.tokenizer.decode(new, skip_special_tokens=True), "logprobs": None}
            if body.get("logprobs"):
                row = [*ids, *new] if self.has_echo else new
                logs = self.decoder(torch.tensor([row])).log_softmax(-1)[0]
                found = [float(logs[i, t]) for i, t in enumerate(row[1:])]
                tops = [{str(int(line.argmax())): float(line.max())} for line in logs[:-1]]
                choice["logprobs"] = {"token_logprobs": [None, *found], "top_logprobs": [None, *tops]}
                if not self.has_echo:
                    choice["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": [{"x": -0.5}]}
            choices.append(choice)
        return {"choices": choices[::-1]}  # the order is in `index`


@contextmanager
def serving(completions):
    """The server's address, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/v1/models":
                self.send(404, {"error": {"message": "no such page"}})
            else:
                self.send(200, {"data": [{"id": completions.name}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with completions.lock:
                completions.keys.append(self.headers.get("Authorization"))
                completions.asked.append(body)
                fault = completions.faults(body)
                self.send(*(fault or (200, completions.complete(body))))

        def send(self, status, document):
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
