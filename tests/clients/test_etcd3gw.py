"""etcd3gw, unmodified, against the daemon; and the same random history to an etcd and to the daemon, whose answers must agree."""

import bisect
import json
import os
import queue
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import unittest
from base64 import b64encode
from urllib.parse import urlsplit

import requests
from etcd3gw import exceptions
from etcd3gw.client import Etcd3Client

from daemon import Daemon


def b64(text):
    return b64encode(text if isinstance(text, bytes) else text.encode()).decode()


def post(url, path, body, token=None, session=requests):
    """Status and JSON, whatever the status. The token goes as clients of etcd send it."""
    headers = {"Authorization": token} if token else {}
    answer = session.post(url + path, data=json.dumps(body), headers=headers, timeout=20)
    return answer.status_code, answer.json()


def authenticated(daemon):
    """A token by the gateway's own way to one."""
    wanted = {"name": daemon.admin["client_id"], "password": daemon.admin["client_secret"]}
    status, body = post(daemon.url, "/v3/auth/authenticate", wanted)
    assert status == 200, body
    return body["token"]


class Etcd3gw(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()
        cls.token = authenticated(cls.daemon)

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def client(self, token=None):
        at = urlsplit(self.daemon.url)
        session = requests.Session()
        session.headers["Authorization"] = token or self.token
        self.addCleanup(session.close)
        return Etcd3Client(host=at.hostname, port=at.port, session=session)

    def test_it_finds_the_api_and_the_members(self):
        client = self.client()
        self.assertEqual(client.api_path, "/v3/")
        self.assertEqual(client.members()[0]["clientURLs"], [self.daemon.url])
        self.assertIn("version", client.status())

    def test_keys(self):
        client = self.client()
        self.assertTrue(client.put("k/1", "one"))
        self.assertTrue(client.create("k/2", "two"))
        self.assertFalse(client.create("k/2", "again"))
        self.assertEqual(client.get("k/1"), [b"one"])
        self.assertEqual(client.get("k/none"), [])
        self.assertEqual(client.get_prefix("k/", sort_order="descend", sort_target="key")[0][0], b"two")
        value, kv = client.get("k/1", metadata=True)[0]
        self.assertEqual((value, kv["version"]), (b"one", "1"))
        self.assertTrue(client.replace("k/1", "one", "eins"))
        self.assertFalse(client.replace("k/1", "one", "uno"))
        self.assertEqual([kv["key"] for _, kv in client.get_all() if kv["key"].startswith(b"k/")], [b"k/1", b"k/2"])
        self.assertTrue(client.delete("k/1"))
        self.assertFalse(client.delete("k/1"))
        self.assertTrue(client.delete_prefix("k/"))
        odd = bytes(range(1, 256))
        client.put(odd, odd)
        self.assertEqual(client.get(odd), [odd])

    def test_leases_and_locks(self):
        client = self.client()
        lease = client.lease(ttl=30)
        client.put("l/1", "v", lease)
        self.assertIn(lease.ttl(), (29, 30))
        self.assertEqual((lease.refresh(), lease.keys()), (30, [b"l/1"]))
        self.assertTrue(lease.revoke())
        self.assertEqual((client.get("l/1"), lease.ttl(), lease.refresh()), ([], -1, -1))
        with client.lock("one", ttl=10) as lock:
            self.assertTrue(lock.is_acquired())
            self.assertFalse(self.client().lock("one", ttl=10).acquire())
            self.assertEqual(lock.refresh(), 10)
        self.assertFalse(lock.is_acquired())

    def test_watches(self):
        client = self.client()
        events, cancel = client.watch_prefix("w/")
        heard = queue.Queue()
        reader = threading.Thread(target=lambda: [heard.put(event) for event in events], daemon=True)
        reader.start()
        client.put("w/1", "one")
        client.put("other", "x")
        client.delete("w/1")
        first, second = heard.get(timeout=10), heard.get(timeout=10)
        self.assertEqual((first["kv"]["key"], first["kv"]["value"]), (b"w/1", b"one"))
        self.assertEqual((second["type"], second["kv"]["key"]), ("DELETE", b"w/1"))
        cancel()
        reader.join(timeout=10)
        self.assertFalse(reader.is_alive())
        threading.Timer(0.5, lambda: self.client().put("w/once", "now")).start()
        self.assertEqual(client.watch_once("w/once", timeout=10)["kv"]["value"], b"now")

    def test_who_may_not_hears_it(self):
        with self.assertRaises(exceptions.Etcd3Exception) as refused:
            self.client("nonsense").get("k")
        self.assertIn("invalid auth token", refused.exception.detail_text)
        body = json.dumps({"client_name": "reader", "scope": "state:read"}).encode()
        status, _, made = self.daemon.send("POST", "/oauth2/register", {"content-type": "application/json"}, body)
        self.assertEqual(status, 201, made)
        made = json.loads(made)
        wanted = {"name": made["client_id"], "password": made["client_secret"]}
        reader = self.client(post(self.daemon.url, "/v3/auth/authenticate", wanted)[1]["token"])
        self.assertEqual(reader.get("k/none"), [])
        with self.assertRaises(exceptions.Etcd3Exception) as refused:
            reader.put("k", "v")
        self.assertIn("permission denied", refused.exception.detail_text)


class Etcd:
    """An etcd of the tests' own."""

    def __init__(self, binary):
        self.dir = tempfile.mkdtemp(prefix="sop-etcd-")
        client, peer = self.free(), self.free()
        self.url = f"http://127.0.0.1:{client}"
        arguments = ["--data-dir", self.dir, "--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        peer = f"http://127.0.0.1:{peer}"
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", f"default={peer}", "--unsafe-no-fsync"]
        self.process = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                if post(self.url, "/v3/kv/range", {"key": b64("x")})[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("etcd did not start")

    @staticmethod
    def free():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        shutil.rmtree(self.dir, ignore_errors=True)


KEYS = ["a", "a/1", "a/2", "a/\x00", "b", b"b\xff", "c/x", "c/y"]
REVISIONS = ("create_revision", "mod_revision", "compact_revision")


class Side:
    """One of the two, with the revisions at which keys changed: a revision is compared by its place among them."""

    def __init__(self, url, token=None):
        self.url, self.token, self.session = url, token, requests.Session()
        self.revisions = [0]
        self.start = int(self.post("/v3/kv/range", {"key": b64("x")})[1]["header"]["revision"])

    def post(self, path, body):
        return post(self.url, path, body, self.token, self.session)

    def placed(self, revision):
        return bisect.bisect_right(self.revisions, int(revision)) - 1

    def plain(self, value):
        """Without what says nothing of the keys, and places for revisions."""
        if isinstance(value, list):
            return [self.plain(v) for v in value]
        if not isinstance(value, dict):
            return value
        out = {}
        for name, v in value.items():
            if name == "header":
                out[name] = self.placed(v["revision"]) if "revision" in v else None
            elif name in REVISIONS:
                out[name] = self.placed(v)
            elif name not in ("message", "detail", "before"):
                out[name] = self.plain(v)
        return out


class History:
    """Random requests; a revision in them is a place, to be put into each side's own."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.leases = []

    def key(self):
        return b64(self.random.choice(KEYS))

    def maybe(self, body, **fields):
        for name, value in fields.items():
            if self.random.random() < 0.3:
                body[name] = value() if callable(value) else value
        return body

    def row(self, body, open_ended=True):
        ends = ["b", "a0", "c", "a/2", "a/1\x00"] + ["\x00"] * open_ended
        return self.maybe(body, range_end=lambda: b64(self.random.choice(ends)))

    def place(self, last):
        return ("place", self.random.randint(1, last + 1))

    def range(self, last, past=True):
        body = self.row({"key": self.key()})
        self.maybe(body, limit=lambda: self.random.randint(0, 3), keys_only=True, count_only=True)
        self.maybe(body, sort_order=lambda: self.random.choice(["NONE", "ASCEND", "DESCEND", 1]))
        self.maybe(body, sort_target=lambda: self.random.choice(["KEY", "VERSION", "CREATE", "MOD", "VALUE", 3]))
        if "limit" in body and "sort_target" in body:
            # Without an order etcd takes the first by key and one more, and puts only those in order.
            body["sort_order"] = self.random.choice(["ASCEND", "DESCEND"])
        if self.random.random() < 0.2:
            bound = self.random.choice(["min_mod_revision", "max_mod_revision", "min_create_revision"])
            body[bound] = ("place", self.random.randint(1, last))
        if past and self.random.random() < 0.2:
            body["revision"] = self.place(last)
        return body

    def put(self):
        body = {"key": self.key(), "value": b64(str(self.random.randint(0, 5)))}
        self.maybe(body, prev_kv=True, ignore_lease=True, lease=lambda: str(self.random.randint(1, 6)))
        if self.random.random() < 0.1:
            body.pop("value")
            body["ignore_value"] = True
        return body

    def delete(self, open_ended=True):
        return self.maybe(self.row({"key": self.key()}, open_ended), prev_kv=True)

    def compare(self, last):
        body = self.row({"key": self.key(), "result": self.random.choice(["EQUAL", "GREATER", "LESS", "NOT_EQUAL", 0])})
        target, name, value = self.random.choice(
            [
                ("VERSION", "version", self.random.randint(0, 3)),
                ("CREATE", "create_revision", ("place", self.random.randint(0, last))),
                ("MOD", "modRevision", ("place", self.random.randint(0, last))),
                ("VALUE", "value", b64(str(self.random.randint(0, 5)))),
                ("LEASE", "lease", str(self.random.randint(0, 3))),
            ]
        )
        return {**body, "target": target, name: value}

    def txn(self, last, depth=2):
        compare = [self.compare(last) for _ in range(self.random.randint(0, 2))]
        return {"compare": compare, "success": self.ops(last, depth), "failure": self.ops(last, depth)}

    def ops(self, last, depth):
        def one():
            if depth > 0 and self.random.random() < 0.1:
                return {"request_txn": self.txn(last, depth - 1)}
            # One inside may delete what one before it put, with etcd; here that is refused.
            kind = self.random.randint(0, 3 if depth == 2 else 2)
            if kind == 0:
                return {"request_range": self.range(last)}
            # Whether a put is inside a row without an end, etcd does not see, and may end itself when it comes to that.
            return {"request_put": self.put()} if kind < 3 else {"request_delete_range": self.delete(open_ended=False)}

        return [one() for _ in range(self.random.randint(0, 4))]

    def step(self, last):
        kind = self.random.random()
        if kind < 0.3:
            body = self.put()
            if "ignore_value" in body or "ignore_lease" in body:
                # Which of two faults is told is not the same by itself and in a transaction.
                body.pop("lease", None)
            return "/v3/kv/put", body
        if kind < 0.55:
            return "/v3/kv/range", self.range(last)
        if kind < 0.65:
            return "/v3/kv/deleterange", self.delete()
        if kind < 0.9:
            return "/v3/kv/txn", self.txn(last)
        lease = str(self.random.randint(1, 6))
        if kind < 0.95:
            return "/v3/lease/grant", {"ID": lease, "TTL": "3600"}
        if kind < 0.97:
            return "/v3/lease/timetolive", {"ID": lease, "keys": True}
        return "/v3/lease/revoke", {"ID": lease}


def placed(value, side):
    """A request with the revisions of a side; a place past the last is one that lies far ahead."""
    if isinstance(value, tuple):
        place = value[1]
        return str(side.revisions[place] if place < len(side.revisions) else side.revisions[-1] + 100_000)
    if isinstance(value, dict):
        return {name: placed(v, side) for name, v in value.items()}
    return [placed(v, side) for v in value] if isinstance(value, list) else value


BINARY = os.environ.get("ETCD") or shutil.which("etcd")


@unittest.skipUnless(BINARY, "there is no etcd to compare with (Debian: etcd-server; or ETCD=PATH)")
class BesideEtcd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()
        cls.etcd = Etcd(BINARY)

    @classmethod
    def tearDownClass(cls):
        cls.etcd.stop()
        cls.daemon.stop()

    def both(self, theirs, ours, path, body):
        answers = []
        for side in (theirs, ours):
            status, answer = side.post(path, placed(body, side))
            revision = int(answer.get("header", {}).get("revision", 0))
            answers.append((status, answer, revision))
        # Where etcd's keys changed, ours did, at the revision that is answered.
        if answers[0][2] > max(theirs.revisions[-1], theirs.start):
            theirs.revisions.append(answers[0][2])
            ours.revisions.append(answers[1][2])
        shown = [(status, side.plain(answer)) for side, (status, answer, _) in zip((theirs, ours), answers)]
        if path.startswith("/v3/lease") and shown[0][0] == 200:
            for _, answer in shown:
                # About how long it has left.
                answer.pop("TTL", None)
                answer.get("keys", []).sort()
        return shown

    def test_the_same_history(self):
        seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
        steps = int(os.environ.get("STEPS", "400"))
        history = History(seed)
        theirs, ours = Side(self.etcd.url), Side(self.daemon.url, authenticated(self.daemon))
        self.addCleanup(theirs.session.close)
        self.addCleanup(ours.session.close)
        compacted = 0
        for step in range(steps):
            last = len(theirs.revisions) - 1
            path, body = history.step(last) if last > 0 else ("/v3/kv/put", {"key": b64("a"), "value": b64("0")})
            if step == steps // 2:
                compacted = last // 2
                path, body = "/v3/kv/compaction", {"revision": ("place", compacted)}
            with self.subTest(seed=seed, step=step, path=path, body=body):
                their, our = self.both(theirs, ours, path, body)
                self.assertEqual(their, our)
        self.assertGreater(len(theirs.revisions), steps // 4, "most of it changed something")
        for options in ({}, {"filters": ["NODELETE"]}, {"range_end": b64("b")}):
            with self.subTest(seed=seed, watch=options):
                create = {"key": b64("\x00"), "range_end": b64("\x00"), "prev_kv": True, **options}
                create["start_revision"] = ("place", compacted + 1)
                their, our = (self.told(side, create) for side in (theirs, ours))
                self.assertEqual(their, our)
                self.assertGreater(len(their), 10)

    def told(self, side, create):
        """All events up to the last revision, by a key that is put after it."""
        status, _ = side.post("/v3/kv/put", {"key": b64("a/end"), "value": b64("end")})
        self.assertEqual(status, 200)
        body = json.dumps({"create_request": placed(create, side)}).encode()
        headers = {"Authorization": side.token} if side.token else {}
        events = []
        with requests.post(side.url + "/v3/watch", data=body, headers=headers, stream=True, timeout=20) as answer:
            for line in answer.iter_lines():
                result = json.loads(line)["result"]
                for event in result.get("events", []):
                    if event["kv"]["key"] == b64("a/end"):
                        # Of one revision, etcd tells them in the order of the operations, we in that of the keys.
                        return sorted(events, key=lambda e: (e["kv"]["mod_revision"], e["kv"]["key"]))
                    events.append(side.plain(event))
        self.fail("the watch ended")


if __name__ == "__main__":
    unittest.main()
