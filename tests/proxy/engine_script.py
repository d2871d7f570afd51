"""A stand-in for vLLM as a process: a real server on a port, with a child of its own, that dies on demand.

Usage: engine_script.py PORT MODEL [never-healthy | deaf | crash]
Its child's pid is in the answer to /children; /die ends the server only, leaving the child behind.
"""

import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, model, mode = int(sys.argv[1]), sys.argv[2], (sys.argv[3] if len(sys.argv) > 3 else "")
if mode == "crash":
    print("engine_script: out of memory, as it were", flush=True)
    sys.exit(7)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
dead_core = False


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global dead_core
        if self.path == "/die":
            os._exit(3)
        if self.path == "/kill-core":
            dead_core = True
        answers = {"/model": model, "/children": f"{os.getpid()} {child.pid}"}
        bad = self.path == "/health" and (mode == "never-healthy" or dead_core)
        body = answers.get(self.path, "").encode()
        self.send_response(503 if bad else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


print(f"engine_script: serving {model} on {port}", flush=True)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
