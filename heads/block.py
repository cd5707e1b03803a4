"""LinearBlock: a few linear heads that see the same batches, trained together step by step.

The heads of a block have one loss and one sequence of batches; learning rate, weight decay and
seed are each head's own. What a step costs is Adam's state and the overhead of small operations,
not arithmetic: so gradients are written out, all heads put their logits through the loss in one
call, and a block is small enough for its state to stay in the cache from step to step.

A head's arithmetic never depends on its neighbours. Its products are calls of their own, of the
same shapes on the CPU, and read arrays that start on a 64-byte boundary as torch's own do, because
a BLAS may add in another order where they do not. Elementwise kernels treat the last few numbers
of an array otherwise than the rest: behind the last head lie spare cells, which nobody reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlc.heads.changing import Changing
from mlc.heads.estimator import BETA1, BETA2, EPS, NODES, Estimator, Visits
from mlc.heads.inputs import Split
from mlc.heads.linear import LinearHead
from mlc.losses.method import Method
from mlc.losses.role import ESTIMATOR_LR_FACTOR, initial_estimator_logits
from mlc.losses.value import loss_gradient, loss_value

ALIGNMENT = 16  # numbers of 4 bytes
SPARE_CELLS = 64  # no vector loop leaves more over
RECORDED = 32  # steps, at most, whose losses are worked out together
RECORDED_CELLS = 2**16  # of a head, at most, in these steps
CELL_COPIES = 10  # of the recorded cells, while their losses are worked out
WARM_UP = 3  # steps before a capture, as torch.cuda.graph asks for


@dataclass(frozen=True)
class Start:
    """How a head of a block differs from its neighbours.

    Attributes:
        lr: of Adam.
        weight_decay: decoupled, of the weights and not of the bias (AdamW).
        seed: of the initial weights and the label estimator.
    """

    lr: float
    weight_decay: float
    seed: int


class LinearBlock:
    """H linear heads in training.

    Args:
        method: of LOSSES.
        knobs: of the method, settled.
        starts: of the heads.
        train: the training split, on the device of training, with the views that steps see.
        batch_size: B; every batch has as many rows.
    """

    def __init__(
        self,
        method: Method,
        knobs: Mapping[str, Any],
        starts: Sequence[Start],
        train: Split,
        batch_size: int,
    ) -> None:
        self._method, self._knobs, self._train = method, knobs, train
        heads, device = len(starts), train.features.device
        width, classes = train.features.shape[1], train.observed.shape[1]
        size = classes * (width + 1)
        parameters, gradients, m, v = (_aligned(heads, size, device) for _ in range(4))
        self.parameters = parameters
        self.weight, self.bias = split_parameters(parameters, classes, width)
        self._weight_gradient, self._bias_gradient = split_parameters(gradients, classes, width)
        self._state = (parameters, m, v, torch.zeros((), device=device))
        self._by_lr = {
            lr: [[each[head] for head in same] for each in (parameters, gradients, m, v)]
            for lr, same in _positions([start.lr for start in starts]).items()
        }
        *_, self._adam_steps = self._state
        self._decay = _decay(starts, device)
        self._views = train.features if train.views is None else train.views.flatten(0, 1)
        # Rows of a step's images and, where there are views, of what it sees of them.
        kinds = 1 if train.views is None else 2
        self._batch = torch.zeros(kinds, batch_size, dtype=torch.long, device=device)
        self._rows, self._seen = self._batch[0], self._batch[-1]
        self._x = torch.empty(batch_size, width, device=device)
        self.estimator = self._start_heads(starts)
        size = batch_size * classes
        with_spare = heads - (-SPARE_CELLS // size)
        cells, self._gradient = (
            _aligned(with_spare, size, device)[:, :size].view(with_spare, batch_size, classes)
            for _ in range(2)
        )
        # The logits of a step and, if there is one, of the estimator; and those of several steps.
        self._cells = [cells] if self.estimator is None else [cells, torch.zeros_like(cells)]
        steps = recorded_steps(batch_size, classes)
        self._recorded = [torch.zeros(steps, *cells.shape, device=device) for _ in self._cells]
        self._changing = Changing(method, knobs, train.observed, with_spare)
        # Labels of a step and of several, where each head has its own.
        self._labels = train.observed.new_zeros(cells.shape if method.rewrite else (0,))
        self._recorded_labels = self._labels.new_zeros(steps, *self._labels.shape)
        self._visit = Visits(
            torch.zeros(batch_size, 3, 1, 1, device=device),
            torch.zeros(NODES, 1, 1, 1, device=device),
            torch.zeros(NODES, 1, heads, 1, device=device),
        )
        self._run = self._step
        if device.type == "cuda" and not method.changes:
            self._run = self._captured()

    def _start_heads(self, starts: Sequence[Start]) -> Estimator | None:
        tables = []
        for weight, bias, start in zip(self.weight, self.bias, starts, strict=True):
            generator = torch.Generator().manual_seed(start.seed)
            head = LinearHead(weight.shape[1], weight.shape[0], generator)
            weight.copy_(head.weight.detach())
            bias.copy_(head.bias.detach())
            if self._method.has_estimator:
                tables.append(initial_estimator_logits(self._train.observed.cpu(), generator))
        if not tables:
            return None
        lr = torch.tensor([start.lr * ESTIMATOR_LR_FACTOR for start in starts])
        device = self._train.features.device
        return Estimator(torch.stack(tables).to(device), lr.to(device))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Have the loss change what it changes from epoch to epoch, counted from 1."""
        features = self._train.features
        self._changing.begin_epoch(epoch, epochs, lambda: torch.stack(self.scores(features)))
        if features.is_cuda and self._method.changes:  # numbers of an epoch are in the graph
            self._run = self._captured()

    def epoch(
        self, batches: Tensor, check: Callable[[], None] = lambda: None, views: Tensor | None = None
    ) -> Tensor:
        """Take a step for each batch; return the mean losses (H,).

        Args:
            batches: (steps, B) rows of the training split, on the CPU.
            check: called before each step; whatever it raises ends training.
            views: (steps, B) int64, likewise: in which each image is seen; by default the first.
        """
        visits = self.estimator.schedule(batches) if self.estimator is not None else None
        seen = batches[:, None]
        if views is not None:  # the rows of a view follow those of the one before it
            images = len(self._train.features)
            seen = torch.stack([batches, views * images + batches], dim=1)
        batches, seen = batches.to(self._rows.device), seen.to(self._rows.device)
        total = torch.zeros(len(self.weight), device=self._rows.device)
        together = len(self._recorded[0])
        for chunk in range(0, len(batches), together):
            rows = batches[chunk : chunk + together]
            for step in range(len(rows)):
                check()
                self._batch.copy_(seen[chunk + step])
                if visits is not None:
                    for mine, now in zip(self._visit, visits.at(chunk + step), strict=True):
                        mine.copy_(now)
                self._run()
                for recorded, mine in zip(self._recorded, self._cells, strict=True):
                    recorded[step] = mine
                self._recorded_labels[step] = self._labels
            total += self._losses(rows)
        return total / len(batches)

    def _losses(self, rows: Tensor) -> Tensor:
        """Return the sums (H,) of the recorded steps' losses: a gradient does not need them."""
        recorded = [each[: len(rows)] for each in self._recorded]
        labels = self._train.observed[rows].unsqueeze(1)
        if self._method.rewrite is not None:
            labels = self._recorded_labels[: len(rows)]
        table = recorded[1] if self.estimator is not None else None
        knobs = self._changing.arguments(rows)
        losses = loss_value(self._method, recorded[0], labels, knobs=knobs, estimator_logits=table)
        # Each head's along memory, as if it were alone.
        return losses.T.contiguous().sum(dim=1)[: len(self.weight)]

    def scores(self, features: Tensor) -> list[Tensor]:
        """Return each head's logits (n, L) of features (n, D)."""
        return [
            torch.addmm(bias, features, weight.t())
            for weight, bias in zip(self.weight, self.bias, strict=True)
        ]

    def _step(self) -> None:
        torch.index_select(self._views, 0, self._seen, out=self._x)
        labels = self._changing.labels(self._rows)
        self._forward()
        if self.estimator is None:
            knobs = self._changing.arguments(self._rows)
            (gradient,) = loss_gradient(self._method, self._cells[0], labels, knobs=knobs)
        else:
            gradient = self._step_of_estimator(self.estimator, labels)
        if self._method.rewrite is not None:
            self._labels.copy_(labels)
            self._changing.after_step(self._rows, self._cells[0], labels)
        self._gradient.copy_(gradient)
        self._backward()
        self._adam()

    def _step_of_estimator(self, estimator: Estimator, labels: Tensor) -> Tensor:
        """Return the gradient of the logits; the estimator takes its step."""
        logits, estimates = self._cells
        table, m, v = estimator.read(self._rows, self._visit)
        heads = len(self.weight)
        estimates[:heads] = table.transpose(0, 1)
        of_logits, of_table = loss_gradient(
            self._method, logits, labels, knobs=self._knobs, estimator_logits=estimates
        )
        estimator.update(self._rows, self._visit, table, m, v, of_table[:heads].transpose(0, 1))
        return of_logits

    def _forward(self) -> None:
        if self._x.is_cuda:
            x = self._x.expand(len(self.weight), *self._x.shape)
            self._cells[0][: len(x)] = torch.baddbmm(
                self.bias[:, None], x, self.weight.transpose(1, 2)
            )
            return
        for weight, bias, logits in zip(self.weight, self.bias, self._cells[0], strict=False):
            torch.addmm(bias, self._x, weight.t(), out=logits)

    def _backward(self) -> None:
        gradient = self._gradient[: len(self.weight)]
        torch.sum(gradient, dim=1, out=self._bias_gradient)
        if self._x.is_cuda:
            x = self._x.expand(len(self.weight), *self._x.shape)
            self._weight_gradient.copy_(torch.bmm(gradient.transpose(1, 2), x))
            return
        for mine, of_weight in zip(gradient, self._weight_gradient, strict=True):
            torch.mm(self._x.t(), mine, out=of_weight.t())

    def _adam(self) -> None:
        if self._decay is not None:
            self.weight *= self._decay
        self._adam_steps += 1
        for lr, (parameters, gradients, m, v) in self._by_lr.items():
            torch._fused_adam_(
                parameters,
                gradients,
                m,
                v,
                [],
                [self._adam_steps] * len(parameters),
                lr=lr,
                beta1=BETA1,
                beta2=BETA2,
                weight_decay=0.0,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )

    def _captured(self) -> Callable[[], None]:
        """Return the step as a CUDA graph: hundreds of kernels for one launch."""
        state = [*self._state, *([self.estimator.table] if self.estimator else [])]
        if self._changing.rewritten is not None:
            state.append(self._changing.rewritten)
        before = [each.clone() for each in state]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        for each, was in zip(state, before, strict=True):  # the warm-up was no training
            each.copy_(was)
        return graph.replay


def split_parameters(parameters: Tensor, classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Return views of heads' parameters (H, P): weights (H, L, D) and biases (H, L).

    In memory the weights lie feature by feature: at 8 and 16 images a product with them takes two
    thirds of the time that it takes the other way round.
    """
    cut = classes * width
    weight = parameters[:, :cut].view(len(parameters), width, classes).transpose(1, 2)
    return weight, parameters[:, cut : cut + classes]


def bytes_of_head(width: int, classes: int) -> int:
    """Return the bytes that a head's step goes through: parameters, gradient and moments."""
    return 4 * 4 * classes * (width + 1)


def recorded_steps(batch_size: int, classes: int) -> int:
    """Return for how many steps losses are worked out together, the same for any neighbours."""
    return max(1, min(RECORDED, RECORDED_CELLS // (batch_size * classes)))


def bytes_of_cells(batch_size: int, classes: int) -> int:
    """Return the bytes that the losses of a head's recorded steps take."""
    return 4 * CELL_COPIES * recorded_steps(batch_size, classes) * batch_size * classes


def _aligned(heads: int, size: int, device: torch.device) -> Tensor:
    """Return zeros (H, P), P >= size, of which each row starts on a 64-byte boundary."""
    return torch.zeros(heads, -(-size // ALIGNMENT) * ALIGNMENT, device=device)


def _positions(values: Sequence[float]) -> dict[float, list[int]]:
    found: dict[float, list[int]] = {}
    for position, value in enumerate(values):
        found.setdefault(value, []).append(position)
    return found


def _decay(starts: Sequence[Start], device: torch.device) -> Tensor | None:
    factors = [1 - start.lr * start.weight_decay for start in starts]
    if all(factor == 1 for factor in factors):
        return None
    return torch.tensor(factors, device=device).view(-1, 1, 1)
