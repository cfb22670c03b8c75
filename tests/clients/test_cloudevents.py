"""The CloudEvents SDK writes events to the record and to a topic, and reads back what it wrote."""

import base64
import json
import unittest
from datetime import datetime, timezone

from cloudevents.core.bindings.http import (
    HTTPMessage,
    from_structured_event,
    to_binary_event,
    to_structured_event,
)
from cloudevents.core.v1.event import CloudEvent

from daemon import Daemon

EVENTS = "/v1/audit/events"


def event(number, **more):
    attributes = {
        "id": f"sdk-{number}",
        "source": "/clients/sdk",
        "type": "org.example.made",
        "specversion": "1.0",
        "time": datetime(2026, 1, 31, 12, 0, number, tzinfo=timezone.utc),
        "subject": "Größe 50%",
        "datacontenttype": "application/json",
    }
    return CloudEvent(attributes={**attributes, **more}, data={"n": number, "text": "naïve"})


class CloudEvents(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def post(self, message, path=EVENTS):
        status, _, body = self.daemon.send("POST", path, message.headers, message.body)
        return status, json.loads(body)

    def kept(self, index, position=0):
        """An event as it is in the record, read by the SDK."""
        status, _, body = self.daemon.send("GET", f"/v1/audit/entries/{index}/records")
        self.assertEqual(status, 200, body)
        item = json.loads(body)["items"][position]
        record = json.loads(base64.b64decode(item["record"]))
        said = record["event"]
        text = said if isinstance(said, str) else json.dumps(said)
        headers = {"content-type": "application/cloudevents+json"}
        return from_structured_event(HTTPMessage(headers=headers, body=text.encode()))

    def same(self, kept, sent):
        for name in ("id", "source", "type", "time", "subject"):
            self.assertEqual(kept.get_attributes()[name], sent.get_attributes()[name])
        self.assertEqual(kept.get_data(), sent.get_data())

    def test_structured(self):
        sent = event(1)
        status, said = self.post(to_structured_event(sent))
        self.assertEqual(status, 201, said)
        self.assertEqual(said["id"], "sdk-1")
        self.same(self.kept(said["index"]), sent)

    def test_binary(self):
        sent = event(2)
        status, said = self.post(to_binary_event(sent))
        self.assertEqual(status, 201, said)
        self.same(self.kept(said["index"]), sent)

    def test_batch_with_one_that_is_none(self):
        sent = [event(3), event(4)]
        parts = [json.loads(to_structured_event(e).body) for e in sent]
        parts.insert(1, {"specversion": "1.0", "id": "no type", "source": "/clients/sdk"})
        headers = {"content-type": "application/cloudevents-batch+json"}
        status, said = self.post(HTTPMessage(headers=headers, body=json.dumps(parts).encode()))
        self.assertEqual((status, said["accepted"], said["refused"]), (201, 2, 1), said)
        for position, one in enumerate(sent):
            self.same(self.kept(said["index"], position), one)

    def test_topic(self):
        status, _, body = self.daemon.send(
            "PUT", "/v1/nexus/topics/sdk", {"content-type": "application/json"}, b'{"retention": 3600}'
        )
        self.assertIn(status, (200, 201), body)
        for message in (to_structured_event(event(5)), to_binary_event(event(6))):
            status, said = self.post(message, "/v1/nexus/topics/sdk/messages")
            self.assertIn(status, (200, 201), said)

    def test_what_is_no_event_is_refused(self):
        message = to_structured_event(event(7))
        status, said = self.post(HTTPMessage(headers=message.headers, body=message.body[:-2]))
        self.assertEqual(status, 400, said)


if __name__ == "__main__":
    unittest.main()
