"""A chat endpoint on this machine, with the faults that real ones have."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable

KEY = "the-right-key"
DROP, HANG = "drop", "hang"


class ChatServer:
  """Speaks the protocol; answers faults first, in turn.

  Attributes:
    faults: of the requests to come: `DROP`, `HANG`, bytes of a body, a tuple
      of status, headers and message, or a function from the request's headers
      to the bytes of the whole response, status line included.
    requests: the bodies that were received.
    headers: those of the newest request.
    reply_fn: the messages of a request -> the text of the answer.
    usage: what every answer says that it took.
  """

  def __init__(self, reply_fn: Callable[[list[dict]], str]):
    self.faults = []
    self.requests = []
    self.headers = {}
    self.reply_fn = reply_fn
    self.usage = {"prompt_tokens": 100, "completion_tokens": 7}
    self.lock = threading.Lock()
    self.hang_is_over = threading.Event()
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    self._server.chat = self
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

  @contextlib.contextmanager
  def running(self):
    thread = threading.Thread(
      target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
    )
    thread.start()
    try:
      yield self
    finally:
      self.hang_is_over.set()
      self._server.shutdown()
      self._server.server_close()
      thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    chat = self.server.chat
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with chat.lock:
      chat.requests.append(body)
      chat.headers = dict(self.headers)
      fault = chat.faults.pop(0) if chat.faults else None
    if fault == DROP:
      self.close_connection = True
    elif fault == HANG:
      chat.hang_is_over.wait(10)
    elif callable(fault):
      self.wfile.write(fault(self.headers))
      self.close_connection = True
    elif isinstance(fault, bytes):
      self._send(200, {}, fault)
    elif fault is not None:
      status, headers, message = fault
      error = {"message": message, "code": message.replace(" ", "_")}
      self._send(status, headers, json.dumps({"error": error}).encode())
    elif self.headers["Authorization"] != f"Bearer {KEY}":
      key = str(self.headers["Authorization"]).removeprefix("Bearer ")
      error = {"message": f"Incorrect API key:\n{key}"}
      self._send(401, {}, json.dumps({"error": error}).encode())
    elif self.path != "/v1/chat/completions":
      self._send(404, {}, b"not found")
    else:
      message = {
        "role": "assistant",
        "content": chat.reply_fn(body["messages"]),
      }
      content = {"choices": [{"message": message}], "usage": chat.usage}
      self._send(200, {}, json.dumps(content).encode())

  def _send(self, status, headers, content):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *args):
    """Says nothing."""
