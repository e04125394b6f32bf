"""Random stories of snapshots against a naive model: a dict of blocks for each."""

from __future__ import annotations

import datetime as dt
import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from calve.region.blocks import Snapshots
from calve.region.signature import Refusal
from calve.region.snapshot import BLOCK_BYTES, Entry, Start, State


class Clock:
    """Time that a story lets pass."""

    def __init__(self):
        self.seconds = 1e6

    def monotonic(self):
        return self.seconds

    def now(self):
        return dt.datetime.fromtimestamp(self.seconds, dt.UTC)


def block(seed):
    return hashlib.shake_128(str(seed).encode()).digest(BLOCK_BYTES)


def put(snapshots, snapshot_id, index, data):
    digest = hashlib.sha256(data).digest()
    with snapshots.flight(snapshot_id, index, digest.hex()):
        entry = Entry(digest, snapshots.blobs.put(digest, data), snapshot_id)
        snapshots.write(snapshot_id, index, digest, entry)


@dataclass
class Model:
    """A snapshot as a dict of blocks."""

    blocks: dict = field(default_factory=dict)
    written: dict = field(default_factory=dict)
    parent: object = None
    state: str = "pending"
    lineage: object = None


CONTENTS = [block(n) for n in range(4)] + [bytes(BLOCK_BYTES)]


class Story(RuleBasedStateMachine):
    """What a region does, and what a naive model says it does."""

    made = Bundle("made")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.open()
        self.models = {}

    def open(self):
        self.snapshots = Snapshots(Path(self.folder.name), clock=self.clock)

    def teardown(self):
        self.folder.cleanup()

    @rule(target=made, blocks=st.dictionaries(st.integers(0, 5), st.integers(0, 4), max_size=3))
    def start(self, blocks):
        made = self.snapshots.start(Start(1)).id
        self.models[made] = Model(lineage=made)
        for index, content in blocks.items():
            self.put(made, index, content, twice=False)
        if blocks:
            self.complete(made, "")
        return made

    @rule(target=made, parent=made)
    def start_child(self, parent):
        model = self.models[parent]
        if model.state != "completed":
            with pytest.raises(Refusal):
                self.snapshots.start(Start(1, parent))
            return parent
        made = self.snapshots.start(Start(1, parent)).id
        self.models[made] = Model(dict(model.blocks), parent=parent, lineage=model.lineage)
        return made

    @rule(one=made, index=st.integers(0, 5), content=st.integers(0, 4), twice=st.booleans())
    def put(self, one, index, content, twice):
        model = self.models[one]
        for _ in range(1 + twice):
            if model.state != "pending":
                with pytest.raises(Refusal):
                    put(self.snapshots, one, index, CONTENTS[content])
                continue
            put(self.snapshots, one, index, CONTENTS[content])
            model.blocks[index] = (CONTENTS[content], one)
            model.written[index] = CONTENTS[content]

    @rule(one=made, lie=st.sampled_from(["", "", "", "count", "sum"]))
    def complete(self, one, lie):
        model = self.models[one]
        digests = [hashlib.sha256(model.written[i]).digest() for i in sorted(model.written)]
        linear = hashlib.sha256(b"".join(digests) + lie.encode()).digest()
        count = len(digests) + (lie == "count")
        if model.state != "pending":
            with pytest.raises(Refusal):
                self.snapshots.complete(one, count, linear)
            return
        self.snapshots.complete(one, count, linear)
        assert self.snapshots.find(one).state is State.PENDING
        self.clock.seconds += 1
        model.state = "error" if lie else "completed"

    @rule(one=made)
    def delete(self, one):
        self.snapshots.delete(one)
        self.models[one].state = "gone"

    @rule(one=made)
    def copy(self, one):
        model = self.models[one]
        if model.state != "completed":
            with pytest.raises(Refusal):
                self.snapshots.copy(self.snapshots, one, Start(0))
            return
        made = self.snapshots.copy(self.snapshots, one, Start(0)).id
        self.clock.seconds += 1
        self.models[made] = Model(dict(model.blocks), lineage=made, state="completed")

    @rule(one=made, other=made)
    def changed(self, one, other):
        models = [self.models[one], self.models[other]]
        if any(model.state != "completed" for model in models):
            return
        old, new = (self.snapshots.blocks(each) for each in (one, other))
        if models[0].lineage == models[1].lineage:
            assert self.snapshots.get(one).lineage == self.snapshots.get(other).lineage
            expected = {
                index
                for index in range(6)
                if models[0].blocks.get(index) != models[1].blocks.get(index)
            }
            assert {i for i in range(6) if old.get(i) != new.get(i)} == expected
        else:
            assert self.snapshots.get(one).lineage != self.snapshots.get(other).lineage

    @rule()
    def reopen(self):
        for model in self.models.values():
            if model.state in {"pending", "error"}:
                model.state = "gone"
        for one in self.models:
            self.snapshots.find(one)
        self.open()

    @invariant()
    def everything_reads_as_the_model_says(self):
        live = set()
        for one, model in self.models.items():
            found = self.snapshots.find(one)
            assert ("gone" if found is None else found.state.value) == model.state
            if model.state == "gone":
                continue
            live.update(data for data, _ in model.blocks.values())
            if model.state != "completed":
                with pytest.raises(Refusal):
                    self.snapshots.blocks(one)
                continue
            read = {}
            for index, entry in self.snapshots.blocks(one).items():
                with self.snapshots.blobs.open(entry.blob) as file:
                    read[index] = file.read()
                assert entry.digest == hashlib.sha256(read[index]).digest()
            assert read == {index: data for index, (data, _) in model.blocks.items()}
        assert len(self.snapshots.blobs) == len(live)
        assert len(list((Path(self.folder.name) / "blocks").iterdir())) == len(live)


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
