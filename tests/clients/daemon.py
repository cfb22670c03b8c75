"""A daemon of the tests' own, on a private PostgreSQL in a folder that is thrown away."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode


class Daemon:
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="sop-clients-")
        # As root, PostgreSQL runs as another user, who must find its folder in this one.
        os.chmod(self.dir, 0o711)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [os.environ.get("SOP", "target/debug/sop"), "serve", "--listen", "127.0.0.1:0", "--data-dir", self.dir],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        line = self.process.stdout.readline()
        if not line.startswith("listening "):
            self.stop()
            self.log.seek(0)
            raise RuntimeError(f"the daemon did not start: {self.log.read()}")
        self.url = line.split()[1]
        with open(f"{self.dir}/admin.json", encoding="utf-8") as file:
            self.admin = json.load(file)
        self.sign_in()

    def sign_in(self):
        """A token of the administrator's."""
        basic = b64encode(f"{self.admin['client_id']}:{self.admin['client_secret']}".encode()).decode()
        form = urllib.parse.urlencode({"grant_type": "client_credentials"}).encode()
        status, _, body = self.send("POST", "/oauth2/token", {"Authorization": f"Basic {basic}"}, form, token=False)
        assert status == 200, body
        self.token = json.loads(body)["access_token"]

    def send(self, method, path, headers=None, body=None, token=True):
        """Status, headers and body, whatever the status."""
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers or {})
        if token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as refused:
            return refused.code, dict(refused.headers), refused.read()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)
        self.process.stdout.close()
        shutil.rmtree(self.dir, ignore_errors=True)
