"""A draft trained from somebody else's loop: they bring tokens and hidden states, and say when a step is to be taken.

Shape letters: T tokens of a sample, N taps, H target hidden size, V target vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from torchspec.core.errors import ClosedError, ConfigError, NonFiniteError, Problem, TargetError
from torchspec.core.export.card import CardFacts
from torchspec.core.export.selfcheck import Probe, SelfCheck
from torchspec.core.interfaces.algorithm import Algorithm, Moment
from torchspec.core.interfaces.features import NormState
from torchspec.core.models.target_tensors import TargetTensors, update_ends
from torchspec.core.parallel.ranks import GivenRanks, lost_ranks_named
from torchspec.core.pipeline import online_state
from torchspec.core.pipeline.card import brought_facts
from torchspec.core.pipeline.online_brought import brought_together
from torchspec.core.pipeline.online_export import Exported, kept_in, layout_of, on_main
from torchspec.core.pipeline.online_setup import OnlineTarget, build_online_model, check_online, load_ends
from torchspec.core.training.apart import Apart, plain_modes
from torchspec.core.training.brought import Required, brought
from torchspec.core.training.capturing import Documents
from torchspec.core.training.checkpoint import differences
from torchspec.core.training.held import Counts, HeldSample, HeldSamples, Pending, Window, window_shares, window_turns
from torchspec.core.training.plan import Cut
from torchspec.core.training.random_state import draw_of, rank_seed
from torchspec.core.training.sharding import COMPUTE, cast_alone, unsharded_state
from torchspec.core.training.timing import StepTimer
from torchspec.core.training.update import Progress, Updater
from torchspec.core.training.window import Sums, run_window

MEGABYTE = 1_000_000
LATEST = 1 - 2**-53
"""The share of the steps that are done, once those that were announced have been taken: the greatest below 1."""


@dataclass(kw_only=True)
class OnlineProgress(Progress):
    """`samples` and `tokens` over all ranks since the start; `target_version`: how often the target was updated."""

    samples: int = 0
    tokens: int = 0
    target_version: int = 0


class OnlineDraftTrainer:
    """Trains a draft on what it is given, by the steps of `torchspec train`: on the same samples in the same order the
    same numbers, to the last bit on a CPU.

    It owns no loop, no signal handler, no logging set-up and no process group, and leaves the process's random states,
    modes and defaults as it finds them (`core.training.apart`). Calls from several threads wait for each other. With
    `group` every method that says "collective" must be called by all its ranks alike.

    What it holds is memory: the draft, its optimizer, copies of the target's ends and of what was brought. `close`, or
    a `with` block, lets go of it.
    """

    def __init__(
        self,
        target: OnlineTarget,
        *,
        algorithm: str = "eagle3",
        draft: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        precision: Mapping[str, Any] | None = None,
        hold: Mapping[str, Any] | None = None,
        target_dtype: str = "auto",
        trust_remote_code: bool = False,
        device: str | None = None,
        seed: int = 0,
        token_counts: Tensor | None = None,
        group: ProcessGroup | None = None,
        patience: float = 600.0,
    ) -> None:
        """Collective.

        target        a directory (or `embedded`), a model of transformers, or `TargetTensors`. What is needed of its
                      weights is copied: `update_target` brings newer values
        draft, train, precision
                      the sections of a configuration of `torchspec train`, without what belongs to its loop; the
                      schedule is constant unless said otherwise, and `train.batch_tokens` makes windows by tokens
        hold          budget_mb (2000), when_full ("refuse" or "drop_oldest"), place ("device" or "host")
        target_dtype  precision of hidden states, embedding and head, as `target.dtype`
        token_counts  int64 [V], how often each id is used, for a draft that is to know only the most frequent ones
        group         ranks that train one draft together, each on samples of its own; None: this process alone

        Raises ConfigError with everything that is wrong, TargetError where the target's tensors do not fit it.
        """
        values = {
            "algorithm": algorithm,
            "seed": seed,
            "patience": patience,
            "target": {"dtype": target_dtype, "trust_remote_code": trust_remote_code},
            **({} if device is None else {"device": device}),
            **{name: section for name, section in
               {"draft": draft, "train": train, "precision": precision, "hold": hold}.items() if section},
        }  # fmt: skip
        with plain_modes():
            checked = check_online(target, values, token_counts, group)
        config = checked.config
        self._config, self._spec, self._vocabulary = config, checked.target, checked.vocabulary
        self._lock, self._closed = threading.RLock(), False
        self._ranks = GivenRanks(
            device=checked.device,
            torch_device=checked.torch_device,
            group=group,
            patience=timedelta(seconds=config.patience),
        )
        self._apart = Apart(checked.device.runtime, checked.torch_device, seed)
        with self._apart.inside(), lost_ranks_named():
            self._refuse_other_settings(checked.algorithm)
            self._ends = load_ends(target, checked)
            self._model = build_online_model(checked, self._ends, self._ranks)
            self._updater = Updater(self._model, config.train)
        self._apart.reseed(rank_seed(seed, 0, self._ranks.data_rank))
        self._cut = Cut.of(
            config.train,
            parameters=sum(p.numel() for p in self._model.draft.parameters() if p.requires_grad),
            hidden=self._spec.hidden_size,
        )
        self._progress = OnlineProgress()
        self._held = HeldSamples(config.hold.budget_mb * MEGABYTE, drop_oldest=config.hold.when_full == "drop_oldest")
        self._probe: Probe | None = None
        self.required = Required(
            tap_layers=checked.algorithm.taps,
            hidden_size=self._spec.hidden_size,
            vocab_size=self._spec.vocab_size,
            longest=min(self._spec.max_position_embeddings, config.train.tokens_per_rank or 2**63),
            dtype=checked.target_dtype,
            place=checked.torch_device if config.hold.place == "device" else torch.device("cpu"),
        )

    @property
    def steps(self) -> int:
        """Windows so far, those without supervision included."""
        return self._progress.step

    @property
    def pending(self) -> Pending:
        """What this rank holds."""
        with self._lock:
            return self._held.pending

    @property
    def counts(self) -> Counts:
        """Of this rank's samples: received = trained + dropped + pending.samples."""
        with self._lock:
            return Counts(**asdict(self._held.counts))

    def add(
        self,
        tokens: Tensor | Sequence[int],
        loss_mask: Tensor | Sequence[bool],
        hidden_states: Mapping[int, Tensor] | Tensor,
        last: Tensor,
        *,
        norm_state: NormState,
        name: str | None = None,
        epoch: int = 0,
    ) -> str:
        """Copy a sample and hold it until a step trains it -> its name.

        tokens         ids [T]
        loss_mask      [T]: token j is to be predicted
        hidden_states  [T, H] for each of `required.tap_layers`, by layer (others are not looked at), or [T, N, H] of
                       them in their order; tap l is the output of decoder layer l, 0-based
        last           [T, H], the output of the last layer, whose `norm_state` says whether the final norm has been
                       applied ("post_norm") or not ("pre_norm")
        name, epoch    decide what an algorithm draws at random of it, with the seed; by default every sample is another

        The copy is made in `required.dtype` in `required.place`. Raises SampleError with everything that is wrong with
        it, and StoreFullError where it does not fit the budget; nothing was kept then.
        """
        with self._storing():
            if name is None:
                name = f"{self._ranks.data_rank}-{self._held.counts.received}"
            features, sample = brought(
                self.required, tokens, loss_mask, hidden_states, last, norm_state=norm_state, name=name, epoch=epoch,
                check_room=self._held.check_room,
            )  # fmt: skip
            self._held.put(
                HeldSample(sample=sample, features=features, epoch=epoch, version=self._progress.target_version)
            )
            if self._probe is None and sample.input_ids_T.numel() > 1:
                self._probe = Probe.record(features)
            return name

    def step(self, *, partial: bool = False) -> dict[str, Any] | None:
        """Train one window of what is held, oldest first -> its metrics, as in a row of metrics.jsonl; None where not
        enough is held (`partial`: anything is enough). Collective.

        `stale_samples` are those that came before the target's last update. Raises NonFiniteError for a loss or
        gradient that is not finite: nothing was updated and the window's samples are dropped; PeerError where other
        ranks do not come, or are lost. After any other error the samples are still held.
        """
        with self._computing():
            timer = StepTimer(self._ranks.torch_device)
            self._updater.optimizer.zero_grad()  # of a step that failed
            told = self._ranks.meet({"lengths": self._offered(), "partial": partial}, "call step()")
            train = self._config.train
            shares = window_shares(
                [each["lengths"] for each in told],
                samples=train.batch_size,
                tokens=train.batch_tokens,
                partial=any(each["partial"] for each in told),
            )
            if shares is None:
                return None
            lengths = [each["lengths"][:share] for each, share in zip(told, shares, strict=True)]
            return self._trained(lengths, timer)

    def evaluate(self, samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss and the algorithm's metrics over samples, each the arguments of `add`; nothing is trained or held.
        Collective.

        Raises SampleError for the first sample that is not as it must be; PeerError where that is another rank's.
        """
        with self._computing(training=False), torch.no_grad():
            held, told = brought_together(self._ranks, self.required, samples, self._progress.target_version)
            window, sums = Window(self._model, self._ranks, held), Sums()
            draft = self._model.draft
            for turn in window_turns(told, self._ranks.data_rank, self._cut, self._progress.step):
                loaded = window.load(turn, window)
                rows, _ = window.rows(turn, loaded)
                mine = loaded[self._ranks.data_rank]
                with cast_alone(draft, self._model.cast):
                    result = self._model.algorithm.step(
                        draft,
                        self._model.head,
                        rows,
                        self._model.device(self._ranks.device),
                        self._model.memory,
                        self._moment(mine, held),
                    )
                sums.add(result, counts=bool(mine.indices))
                if isinstance(draft, FSDPModule):
                    draft.reshard()  # no backward pass frees what was gathered
            if not any(told):
                return {"loss": None, "samples": 0}
            return {**self._updater.summary(sums.reduce(self._ranks)), "samples": sum(map(len, told))}

    def update_target(
        self,
        target: PreTrainedModel | TargetTensors | None = None,
        *,
        embedding: Tensor | None = None,
        head: Tensor | None = None,
        norm: Tensor | Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take over newer values of the target's embedding [V, H], head [V, H] and final norm, whole or in part.

        The draft is taught by `last` through the head as it is when the step is taken, so call it between the steps of
        the samples before and after the change. Every rank must be given the same. Raises TargetError, and changes
        nothing, where a tensor has another shape or is not finite, and where both a target and tensors are given, or
        neither.
        """
        parts = {"embedding": embedding, "head": head, "norm": norm}
        given = [name for name, part in parts.items() if part is not None]
        if (target is None) == (not given):
            found = f"a target and {', '.join(given)}" if given else "nothing"
            raise TargetError(f"the target was not updated: given {found}, expected a target or some of its tensors")
        if target is not None:
            if not isinstance(target, PreTrainedModel | TargetTensors):
                raise TargetError(
                    f"the target was not updated: given a {type(target).__name__}, expected a model of transformers or "
                    "torchspec.TargetTensors"
                )
            whole = TargetTensors.of(target) if isinstance(target, PreTrainedModel) else target
            embedding, head, norm = whole.embedding_VH, whole.head_VH, whole.norm
        with self._storing():
            update_ends(self._ends, embedding_VH=embedding, head_VH=head, norm=norm)
            self._progress.target_version += 1

    def clear(self) -> int:
        """Drop what this rank holds -> how many samples, which are counted as dropped."""
        with self._lock:
            count = len(self._held)
            self._held.dropped(count)
            return count

    def close(self) -> None:
        """Let go of everything but counters: of what waits, too, which is counted as dropped.

        Waits for a call in another thread. Not collective, and the group stays whose it was. Whatever is called
        afterwards raises ClosedError, but `clear`, another `close` and the properties. Memory of a device returns to
        torch's allocator in this process.
        """
        with self._lock:
            self.clear()
            if not self._closed:
                self._closed = True
                del self._model, self._updater, self._ends
                self._probe = None

    def __enter__(self) -> Self:
        with self._storing():
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self, *, held: bool = True) -> dict[str, Any]:
        """Everything that the next steps depend on but the target's tensors: this rank's part, copied to the host.

        Nested dicts and lists of tensors and plain values, which `torch.load(weights_only=True)` reads. Without `held`
        the samples that wait are left out, and count as dropped in who continues.
        """
        with self._storing():
            return online_state.saved(
                identity=self._identity(),
                updater=self._updater,
                progress=asdict(self._progress),
                random=self._apart.random,
                held=self._held,
                with_held=held,
                probe=self._probe,
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of this rank, to the last bit, given the same target tensors.

        Learning rates and the like may differ. Raises CheckpointError, naming each difference, where it is the state of
        another draft, seed or rank; nothing was changed then.
        """
        with self._storing():
            online_state.check(state, self._identity(), self._updater)
            online_state.fill(state, self._updater, self._held, self.required.place)
            self._progress = OnlineProgress(**state["progress"])
            self._probe = None if state["probe"] is None else Probe(**state["probe"])
            self._apart.random = state["random"]

    def export(
        self, directory: str | Path, *, format: str | None = None, dtype: torch.dtype = torch.float32
    ) -> SelfCheck:
        """Write the draft as `torchspec export` does, self-check and model card included. Collective; the group's first
        rank writes.

        `format` hf, sglang or vllm; default: the algorithm's own. Raises ConfigError, CheckpointError on every rank.
        """
        with self._computing(training=False):
            draft = self._exported(format, dtype)
            parts = (self._vocabulary, self._ends, self._probe)
            return on_main(self._ranks, lambda: draft.write(Path(directory), *parts, self._card()))

    def draft_weights(
        self, *, format: str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, on the host, of everything that `export` would write into model.safetensors; by default in
        the compute precision. Collective, and done when it returns: the iterator asks nobody."""
        with self._computing(training=False):
            draft = self._exported(format, dtype or COMPUTE[self._config.precision.compute] or torch.float32)
            return iter(draft.files().tensors.items())

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Of a call that computes nothing."""
        with self._lock, plain_modes():
            self._check_open()
            yield

    @contextmanager
    def _computing(self, *, training: bool = True) -> Iterator[None]:
        with self._lock:
            self._check_open()
            with self._apart.inside(training=training), lost_ranks_named():
                yield

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this OnlineDraftTrainer has been closed, and has no draft any more: make another one")

    def _offered(self) -> list[int]:
        """Lengths of the samples that the next window may take of this rank."""
        train, lengths, tokens = self._config.train, list[int](), 0
        for each in self._held.first(len(self._held) if train.batch_tokens else train.batch_size):
            if train.batch_tokens and tokens >= train.batch_tokens:
                break
            lengths.append(each.length)
            tokens += each.length
        return lengths

    def _trained(self, lengths: Sequence[Sequence[int]], timer: StepTimer) -> dict[str, Any]:
        """One window of the first samples of each rank, of these lengths."""
        rank, progress = self._ranks.data_rank, self._progress
        mine = self._held.first(len(lengths[rank]))
        window = Window(self._model, self._ranks, mine)
        turns = window_turns(lengths, rank, self._cut, progress.step)
        result = run_window(
            self._model, window, turns, window, self._ranks, timer, lambda documents: self._moment(documents, mine)
        )
        stale = self._ranks.sum([sum(each.version != progress.target_version for each in mine)])[0]
        try:
            with timer.phase("optimizer"):
                total = self._config.train.max_steps or 0
                rate, norm = self._updater.update(result.sums, progress, total, lambda norm: self._refuse(mine, norm))
        except NonFiniteError:
            self._held.dropped(len(mine))
            raise
        self._held.trained(len(mine))
        progress.step += 1
        progress.samples += sum(map(len, lengths))
        progress.tokens += result.sums.tokens
        phases, seconds = timer.finish()
        return {
            "step": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "empty_windows": progress.empty_windows,
            "stale_samples": stale,
            **self._updater.summary(result.sums),
            "lr": rate,
            "grad_norm": norm,
            "padding_fraction": 1 - result.sums.tokens / max(1, result.sums.positions),
            "step_seconds": seconds,
            "time": phases,
        }

    def _moment(self, documents: Documents, held: Sequence[HeldSample]) -> Moment:
        total = self._config.train.max_steps
        share = 0.0 if total is None else min(self._progress.step / total, LATEST)
        epochs = [held[index].epoch for index in documents.indices] or [0]
        draws = [
            draw_of(self._config.seed, epoch, sample.sample_id)
            for epoch, sample in zip(epochs, documents.samples, strict=True)
        ]
        return self._updater.moment(self._progress, share, draws)

    def _refuse(self, mine: Sequence[HeldSample], norm: float) -> NoReturn:
        names = ", ".join(each.sample.sample_id for each in mine[:16])
        raise NonFiniteError(
            f"step {self._progress.step + 1}: the loss or its gradient (norm {norm}) is not finite; the parameters "
            f"were not updated and the window's samples are dropped, of this rank {names or 'none'}"
            f"{f' and {len(mine) - 16} more' if len(mine) > 16 else ''}. Look at these samples, or lower train.lr or "
            "train.clip_norm"
        )

    def _exported(self, format: str | None, dtype: torch.dtype) -> Exported:
        """Collective, unless there is no such format or dtype."""
        algorithm = self._model.algorithm
        layout, dtype = layout_of(algorithm, format), kept_in(dtype)
        return Exported(
            algorithm=algorithm,
            state=unsharded_state(self._model.draft),
            layout=layout,
            dtype=dtype,
            target_changed=self._progress.target_version > 0,
        )

    def _card(self) -> CardFacts:
        """What is known of the draft: how much it was given and with which settings, not what."""
        progress = self._progress
        counts = {
            "steps": progress.step,
            "samples trained on, repeats counted": progress.samples,
            "tokens trained on": progress.tokens,
        }
        given = {"algorithm": self._config.algorithm, "seed": self._config.seed}
        for name in ("draft", "train", "precision"):
            given[name] = getattr(self._config, name).model_dump(mode="json", exclude_unset=True)
        machine = {"device": self._ranks.device.name, "ranks": self._ranks.size, "torch": torch.__version__}
        settings = {name: value for name, value in given.items() if value != {}}
        return brought_facts(self._model.algorithm, self._spec, counts, progress.target_version, settings, machine)

    def _identity(self) -> dict[str, Any]:
        return online_state.identity(
            self._config, self._model.algorithm, self._spec, self._vocabulary, (self._ranks.data_rank, self._ranks.size)
        )

    def _refuse_other_settings(self, algorithm: Algorithm) -> None:
        """ConfigError, on all ranks, where they were not given the same."""
        mine = online_state.shared_settings(self._config, algorithm, self._spec, self._vocabulary)
        told = self._ranks.meet(mine, "make their trainer")
        problems = [
            Problem(field=f"rank {rank}", message=f"was given other settings than rank 0: {line}")
            for rank, each in enumerate(told)
            for line in differences(told[0], each, names=("rank 0", f"rank {rank}"))
        ]
        if problems:
            raise ConfigError(problems)
