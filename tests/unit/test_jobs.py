# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder's jobs when something fails in them, against a hypervisor of this test and a xenstore in memory."""

import pytest
from backends import Kernel, Memory
from test_sleep import HVM, PV, RUNNING, UUID

from xenvm.boundary.messages import NO_DOMAIN, DomainState, Job, Op, Phase
from xenvm.errors import ExitCode, TimeoutExpiredError, XenvmError
from xenvm.helpers.builder import tree
from xenvm.helpers.builder.hypervisor import HypervisorError
from xenvm.helpers.builder.jobs import Builder
from xenvm.helpers.store import StoreError

SUSPENDED = RUNNING.but(state=DomainState.SHUTDOWN, reason=2)


class Host:
    """A hypervisor with one domain at most; `fails` are calls that do so, `acts` what was done."""

    def __init__(self, domain=None, **fails):
        self.domain, self.fails, self.acts = domain, fails, []

    def __getattr__(self, name):
        def call(*arguments, **_words):
            self.acts.append((name, *arguments))
            if name in self.fails:
                raise self.fails[name]

        return call

    def find(self, _uuid):
        return [self.domain] if self.domain else []

    def look(self, _domid, _uuid):
        return self.domain

    def exists(self, _domid):
        return self.domain is not None

    def create_pv(self, *_):
        self.domain = RUNNING.but(state=DomainState.PAUSED)
        return self.domain.domid

    create_hvm = create_pv

    def event_channel(self, *_):
        return 1

    def destroy(self, domid):
        self.acts.append(("destroy", domid))
        if "destroy" in self.fails:
            raise self.fails["destroy"]
        self.domain = None


class Broker:
    """What is asked of the broker."""

    def __init__(self, host):
        self._host = host

    def begin(self, *_):
        """Nothing has devices here."""

    def release(self, domid, server):
        self._host.acts.append(("end the device model", domid, server))


@pytest.fixture
def store(tmp_path):
    made = Memory()
    made.kernel = Kernel(made, tmp_path)
    made.resume = lambda _domid: None
    return made


def builder(host, store):
    return Builder(host, store, Broker(host), lambda *_: None)


def job(op, grants=PV):
    return Job(op, UUID, 7, grants.but(check_memory=False))


@pytest.mark.parametrize("noted", ["4711 99", "", "nonsense"])
def test_a_device_model_is_ended_before_its_domain_whether_it_was_noted_or_not(store, noted):
    """Its builder may have died, or failed, when it ran and was not in the record yet."""
    tree.write_record(store, UUID, 7, Phase.BUILDING)
    tree.write_machine(store, 7, UUID, HVM.machine[0])
    if noted:
        store.write(f"/xenvm/{UUID}/model/server", noted)
    host = Host(RUNNING)
    builder(host, store).run(job(Op.DESTROY, HVM), [])
    told = ("end the device model", 7, noted if noted == "4711 99" else "")
    assert [act for act in host.acts if act[0] != "pause"] == [told, ("destroy", 7)]
    assert not [node for node in store.nodes if UUID in node]


def test_a_domain_without_a_device_model_has_none_ended(store):
    tree.write_record(store, UUID, 7, Phase.BUILT)
    host = Host(RUNNING)
    builder(host, store).run(job(Op.DESTROY), [])
    assert host.acts == [("pause", 7), ("destroy", 7)]


def test_a_suspended_guest_is_stopped_as_crashed_though_xenstored_does_not_answer(store):
    """Else it would stay paused: its monitor asked for this since its device model has ended."""

    def silent(_domid):
        raise TimeoutExpiredError("xenstored did not answer within 40 s")

    store.resume = silent
    host = Host(SUSPENDED)
    builder(host, store).run(job(Op.CRASH, HVM), [])
    assert [act[0] for act in host.acts] == ["pause", "resume", "crash", "unpause"]


@pytest.mark.parametrize(
    ("cause", "hint"),
    [
        (HypervisorError("no", hint="try another", code=ExitCode.BUSY), "try another; "),
        (HypervisorError("no", code=ExitCode.BUSY), ""),
    ],
)
def test_a_build_fails_of_what_made_it_fail_and_not_of_the_tidying(store, cause, hint):
    made = builder(Host(load_pv=cause, destroy=StoreError("xenstored is gone")), store)
    with pytest.raises(XenvmError) as caught:
        made.run(job(Op.BUILD), [0])
    assert (caught.value.message, caught.value.code) == ("no", ExitCode.BUSY)
    assert caught.value.hint == f"{hint}what it has left could not be removed: xenstored is gone"
    assert made.left == NO_DOMAIN.but(phase=Phase.BUILDING)


def test_a_build_that_fails_and_is_removed_says_nothing_of_that(store):
    cause = HypervisorError("no", hint="try another")
    host = Host(load_pv=cause)
    made = builder(host, store)
    with pytest.raises(HypervisorError) as caught:
        made.run(job(Op.BUILD), [0])
    assert (caught.value.hint, made.left, host.domain) == ("try another", NO_DOMAIN, None)


def test_an_error_of_ours_is_not_hidden_by_the_tidying(store):
    made = builder(Host(load_pv=ValueError("ours"), destroy=StoreError("xenstored is gone")), store)
    with pytest.raises(ValueError, match="ours"):
        made.run(job(Op.BUILD), [0])
    assert made.left == NO_DOMAIN.but(phase=Phase.BUILDING)
