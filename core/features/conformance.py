"""The contract of a `FeatureStore` as checks that any implementation can be put through.

Each check takes a function that opens a fresh, empty store and raises AssertionError with what was broken. A store from
elsewhere is tested with

    @pytest.mark.parametrize("check", STORE_CHECKS)
    def test_the_store_keeps_the_contract(check): check(open_my_store)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from torchspec.core.errors import DamagedRecordError, MissingRecordError
from torchspec.core.interfaces.features import Features, FeatureStore, NormState

OpenStore = Callable[[], FeatureStore]


def sample_features(
    length: int = 5,
    *,
    taps: tuple[int, ...] = (1, 3, 5),
    hidden: int = 8,
    dtype: torch.dtype = torch.float32,
    norm_state: NormState = "pre_norm",
    seed: int = 0,
) -> Features:
    """Random features of one record."""
    generator = torch.Generator().manual_seed(seed)
    return Features(
        input_ids_T=torch.randint(0, 1000, (length,), generator=generator),
        taps_TNH=torch.randn(length, len(taps), hidden, generator=generator).to(dtype),
        last_TH=torch.randn(length, hidden, generator=generator).to(dtype),
        tap_layers=taps,
        norm_state=norm_state,
    )


def gives_out_what_was_put(open_store: OpenStore) -> None:
    """Bit for bit, in every dtype and norm state, for one token and many, without taps too."""
    store = open_store()
    cases = [
        sample_features(dtype=dtype, norm_state=state)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for state in ("pre_norm", "post_norm")
    ]
    cases += [sample_features(1), sample_features(300, hidden=7), sample_features(taps=())]
    refs = [store.put(f"record {number}", features) for number, features in enumerate(cases)]
    for number, (ref, features) in enumerate(zip(refs, cases, strict=True)):
        got = store.get(ref)
        assert ref.record_id == f"record {number}", "the reference names another record"
        assert ref.length == len(features.input_ids_T), "the reference gives another length"
        assert (got.tap_layers, got.norm_state) == (features.tap_layers, features.norm_state), "facts were changed"
        for name in ("input_ids_T", "taps_TNH", "last_TH"):
            put, taken = getattr(features, name), getattr(got, name)
            assert taken.dtype == put.dtype, f"{name} came back as {taken.dtype}"
            assert torch.equal(taken, put), f"{name} came back with other values"


def keeps_odd_ids_apart(open_store: OpenStore) -> None:
    """Ids are any text: paths, dots, other scripts, long ones."""
    store = open_store()
    ids = ["a", "a/b", "../a", ".a", "a b", "ä", "a" * 300, "a" * 299 + "b", "A+1", "a\nb"]
    refs = {text: store.put(text, sample_features(seed=number)) for number, text in enumerate(ids)}
    for number, text in enumerate(ids):
        expected = sample_features(seed=number).last_TH
        assert torch.equal(store.get(refs[text]).last_TH, expected), f"record {text!r} holds another one's features"


def refuses_an_id_twice(open_store: OpenStore) -> None:
    """The first record stays as it was."""
    store = open_store()
    first = store.put("sample", sample_features(seed=1))
    _raises(ValueError, "sample", lambda: store.put("sample", sample_features(seed=2)))
    assert torch.equal(store.get(first).last_TH, sample_features(seed=1).last_TH), "the first record was replaced"
    assert store.usage().records == 1, "a refused record is counted"


def refuses_features_that_disagree(open_store: OpenStore) -> None:
    store = open_store()
    good = sample_features()
    _raises(ValueError, "sample", lambda: store.put("sample", replace(good, last_TH=good.last_TH[:-1])))
    _raises(ValueError, "sample", lambda: store.put("sample", replace(good, tap_layers=(1, 3))))
    assert store.usage().records == 0, "a refused record is there"


def names_what_is_missing(open_store: OpenStore) -> None:
    store = open_store()
    ref = store.put("sample", sample_features())
    store.remove(ref)
    _raises(MissingRecordError, "sample", lambda: store.get(ref))
    _raises(MissingRecordError, "sample", lambda: store.remove(ref))
    again = store.put("sample", sample_features(seed=3))
    assert torch.equal(store.get(again).last_TH, sample_features(seed=3).last_TH), "an id cannot be used again"


def refuses_another_length(open_store: OpenStore) -> None:
    store = open_store()
    ref = store.put("sample", sample_features())
    _raises(DamagedRecordError, "sample", lambda: store.get(replace(ref, length=ref.length + 1)))


def keeps_what_was_taken(open_store: OpenStore) -> None:
    """Features in use outlive their record."""
    store = open_store()
    ref = store.put("sample", sample_features())
    got = store.get(ref)
    store.remove(ref)
    store.put("sample", sample_features(seed=9))
    assert torch.equal(got.taps_TNH, sample_features().taps_TNH), "features taken out were overwritten"


def counts_what_it_holds(open_store: OpenStore) -> None:
    store = open_store()
    assert store.usage().records == 0, "a fresh store is not empty"
    features = sample_features(100)
    refs = [store.put(str(number), features) for number in range(3)]
    least = 3 * (features.taps_TNH.nbytes + features.last_TH.nbytes)
    usage = store.usage()
    assert usage.records == 3, f"{usage.records} records of 3 are counted"
    assert usage.nbytes >= least, f"{usage.nbytes} bytes are counted of at least {least}"
    for ref in refs:
        store.remove(ref)
    assert store.usage().records == store.usage().nbytes == 0, "removed records are still counted"


def serves_threads(open_store: OpenStore) -> None:
    """Writers and readers at the same time; of writers of one id, one wins."""
    store = open_store()
    won: list[int] = []
    lost: list[Exception] = []

    def work(number: int) -> None:
        ref = store.put(f"own {number}", sample_features(seed=number))
        expected = sample_features(seed=number).last_TH
        if not torch.equal(store.get(ref).last_TH, expected):
            lost.append(AssertionError(f"record {number} came back with other values"))
        try:
            store.put("shared", sample_features(seed=number))
            won.append(number)
        except ValueError as error:
            lost.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1, f"{len(won)} writers of one id succeeded"
    assert all(isinstance(error, ValueError) for error in lost), f"{lost}"
    assert store.usage().records == 9, f"{store.usage().records} records of 9 are there"


def is_closed_for_good(open_store: OpenStore) -> None:
    store = open_store()
    ref = store.put("sample", sample_features())
    store.close()
    for use in (lambda: store.get(ref), lambda: store.put("other", sample_features()), store.usage):
        _raises(RuntimeError, "closed", use)


def _raises(kind: type[Exception], named: str, work: Callable[[], object]) -> None:
    try:
        work()
    except kind as error:
        if named not in str(error):
            raise AssertionError(f"the message does not name {named!r}: {error}") from error
        return
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} was raised, not {kind.__name__}: {error}") from error
    raise AssertionError(f"no {kind.__name__} was raised")


STORE_CHECKS: tuple[Callable[[OpenStore], None], ...] = (
    gives_out_what_was_put,
    keeps_odd_ids_apart,
    refuses_an_id_twice,
    refuses_features_that_disagree,
    names_what_is_missing,
    refuses_another_length,
    keeps_what_was_taken,
    counts_what_it_holds,
    serves_threads,
    is_closed_for_good,
)
