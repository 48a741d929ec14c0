"""The run as a TensorBoard event file: `tensorboard --logdir $(python build.py path train)`.

Written record by record, so that it can be watched while the run goes on, and without the host name,
process number and clock that TensorBoard's own writer puts into file name and events: one run is one file,
byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from stages.train.loop import History

FILE = "events.out.tfevents.0.annie"  # TensorBoard looks for the middle part


class Board:
    """An event file in `folder`. A resumed run begins with what came before."""

    def __init__(self, folder: Path, history: History):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.opened = (folder / FILE).open("wb")
        self.records = RecordWriter(self.opened)
        self.records.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        for step in history.train:
            self.step(history, step)

    def step(self, history: History, step: int) -> None:
        """Everything that was measured at `step`. The clock is the step's number."""
        self._write(
            step,
            {
                "loss/training": history.train[step],
                "gradient norm": history.norm[step],
                "learning rate": history.rate[step],
            },
        )
        if step in history.held_out:
            self.held_out(history.held_out[step], step)

    def held_out(self, value: float, step: int) -> None:
        self._write(step, {"loss/held out": value})

    def _write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self.records.write(Event(wall_time=float(step), step=step, summary=summary).SerializeToString())
        self.opened.flush()

    def close(self) -> None:
        self.opened.close()
