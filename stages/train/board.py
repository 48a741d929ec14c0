"""The run as a TensorBoard event file: `tensorboard --logdir $(python build.py path train)`.

Each record is written at once, so the file can be watched during the run. TensorBoard's own writer puts host
name, process number and clock into the file; this one does not, so that equal runs write equal bytes.
"""

from __future__ import annotations

from pathlib import Path

from stages.train.loop import History

FILE = "events.out.tfevents.0.annie"  # TensorBoard searches for "tfevents"


class Board:
    """An event file in `folder`. In a resumed run it begins with the earlier steps."""

    def __init__(self, folder: Path, history: History):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.opened = (folder / FILE).open("wb")
        self.records = RecordWriter(self.opened)
        self.records.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        if 0 in history.held_out:
            self.held_out(history.held_out[0], 0)
        for step in history.train:
            self.step(history, step)

    def step(self, history: History, step: int) -> None:
        """Writes everything that was measured at `step`. The step's number is the clock."""
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
