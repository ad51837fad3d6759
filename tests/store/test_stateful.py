"""Any sequence of changes. Oracle: a dictionary (model.py), and the list of files that its entries need."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overture.store import Key, PromptStore

from .conftest import quick_folder, stored_files
from .model import KINDS, Model, apply, view

TENANTS, NAMES = st.sampled_from(["tenant-0", "tenant-1"]), st.sampled_from(["name-0", "name-1"])


class Comparison(RuleBasedStateMachine):
    """One store and one dictionary under the same changes."""

    key: Key | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = ExitStack()
        self.root = self.folder.enter_context(quick_folder())
        self.store = PromptStore(self.root / "store", key=self.key, memory=600)
        self.model = Model()

    @rule(kind=st.sampled_from(list(KINDS)), tenant=TENANTS, name=NAMES, number=st.integers(0, 4))
    def change(self, kind: str, tenant: str, name: str, number: int) -> None:
        change = kind, tenant, name, number
        assert apply(self.store, change) == self.model.apply(change)

    @rule()
    def open_anew(self) -> None:
        self.store.close()
        self.store = PromptStore(self.root / "store", key=self.key, memory=600)

    @rule(tenant=TENANTS)
    def move_by_export(self, tenant: str) -> None:
        target = Path(tempfile.mkdtemp(dir=self.root))
        self.store.export(target / "out")
        with PromptStore(target / "store") as other:
            other.import_folder(target / "out")
            prompts = {key: entry for key, entry in self.model.view().items() if not key.startswith("state of")}
            assert view(other) == prompts

    @invariant()
    def same(self) -> None:
        assert view(self.store) == self.model.view()

    @invariant()
    def no_other_files(self) -> None:
        needed = {(tenant, sha) for (tenant, _), e in self.model.names.items() for sha in e.versions.values()}
        needed |= {(tenant, sha256(state).hexdigest()) for (tenant, _), state in self.model.states.items()}
        files = stored_files(self.root / "store")
        assert len(files) == len(needed)
        assert {path.name.split(".")[0] for path in files} == {sha for _, sha in needed}

    def teardown(self) -> None:
        self.store.close()
        self.folder.close()


class Encrypted(Comparison):
    """The same in an encrypted store."""

    key = Key(bytes(range(32)))


# Long sequences: a prompt needs several changes before the interesting ones are possible.
TestPlain = Comparison.TestCase
TestPlain.settings = settings(max_examples=8, stateful_step_count=30)
TestEncrypted = Encrypted.TestCase
TestEncrypted.settings = settings(max_examples=3, stateful_step_count=25)
