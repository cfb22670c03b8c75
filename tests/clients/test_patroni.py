"""Patroni, unmodified, with the daemon for its etcd: two members elect a leader, and the other takes over when it is killed.

Run by `make test-patroni`. PostgreSQL does not run as root: as root it is run as `postgres`, by the system's Python if that user
cannot run this one.
"""

import glob
import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

from daemon import Daemon

BIN = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4]))
TTL = 20


def other():
    """Who runs it: nobody else, or `postgres` if this is root."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def python():
    """An interpreter that user can run, and its environment; `None` if there is none with patroni."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages"))}
    # The system's is not to take its own packages for ours.
    for command in ([sys.executable], ["/usr/bin/python3", "-S"]):
        tried = [*command, "-c", "import patroni.dcs.etcd3, psycopg"]
        try:
            subprocess.run(tried, env=env, cwd="/", check=True, capture_output=True, **other())
            return command, env
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def free():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Member:
    def __init__(self, name, folder, etcd):
        self.name, self.data, self.rest = name, f"{folder}/{name}", free()
        trust = ["host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust", "local all all trust"]
        database = f"127.0.0.1:{free()}"
        rest = f"127.0.0.1:{self.rest}"
        config = {
            "scope": "demo",
            "name": name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": etcd,
            "bootstrap": {
                "dcs": {"ttl": TTL, "loop_wait": 2, "retry_timeout": 5},
                "initdb": [{"encoding": "UTF8"}],
                "pg_hba": trust,
            },
            "postgresql": {
                "listen": database,
                "connect_address": database,
                "data_dir": self.data,
                "bin_dir": BIN[-1],
                "pgpass": f"{folder}/{name}.pgpass",
                "authentication": {
                    "superuser": {"username": "postgres", "password": "x"},
                    "replication": {"username": "replicator", "password": "x"},
                },
                "parameters": {"unix_socket_directories": folder},
            },
        }
        file = f"{folder}/{name}.json"
        with open(file, "w", encoding="utf-8") as out:
            # JSON is YAML.
            json.dump(config, out)
        how = other()
        if how:
            os.chown(file, how["user"], how["group"])
        command, env = python()
        self.log = open(f"{folder}/{name}.log", "w", encoding="utf-8")
        self.process = subprocess.Popen(
            [*command, "-m", "patroni", file], stdout=self.log, stderr=self.log, cwd=folder, env=env, **how
        )

    def members(self):
        """Name and role of each, as this one sees it."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.rest}/cluster", timeout=5) as answer:
                seen = json.load(answer)["members"]
        except (OSError, KeyError):
            return {}
        return {m["name"]: m["role"] for m in seen if m["state"] in ("running", "streaming")}

    def kill(self):
        """Ends it and its PostgreSQL as a power cut does."""
        self.process.kill()
        self.process.wait()
        with open(f"{self.data}/postmaster.pid", encoding="utf-8") as file:
            os.kill(int(file.readline()), signal.SIGKILL)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)
        self.log.close()


@unittest.skipUnless(os.environ.get("PATRONI"), "Patroni is tested by `make test-patroni`")
@unittest.skipUnless(importlib.util.find_spec("patroni") and BIN, "there is no patroni, or no PostgreSQL")
class Patroni(unittest.TestCase):
    def setUp(self):
        self.assertIsNotNone(python(), "`postgres` can run no Python that has patroni: make the virtual environment elsewhere")
        self.daemon = Daemon()
        self.addCleanup(self.daemon.stop)
        self.folder = tempfile.mkdtemp(prefix="sop-patroni-")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")

    def member(self, name):
        admin = self.daemon.admin
        host = self.daemon.url.removeprefix("http://")
        etcd = {"host": host, "username": admin["client_id"], "password": admin["client_secret"]}
        member = Member(name, self.folder, etcd)
        self.addCleanup(member.stop)
        return member

    def until(self, member, roles, within):
        end = time.monotonic() + within
        while member.members() != roles:
            if time.monotonic() > end or member.process.poll() is not None:
                with open(f"{self.folder}/{member.name}.log", encoding="utf-8") as log:
                    self.fail(f"{member.members()} is not {roles}:\n{log.read()[-3000:]}")
            time.sleep(0.5)

    def test_a_leader_is_elected_and_replaced(self):
        first = self.member("one")
        self.until(first, {"one": "leader"}, 90)
        second = self.member("two")
        self.until(second, {"one": "leader", "two": "replica"}, 90)
        # The keys are the room's own, under Patroni's names.
        status, _, body = self.daemon.send("GET", "/v1/state/kv?keys_only=true")
        self.assertEqual(status, 200)
        self.assertGreater(len(json.loads(body)["items"]), 3)
        first.kill()
        self.until(second, {"two": "leader"}, 3 * TTL + 30)


if __name__ == "__main__":
    unittest.main()
