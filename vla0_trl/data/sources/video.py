"""mp4 files from front to back, frame by frame at given times."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np

from vla0_trl.data.episodes import EpisodeError, check_frame_size
from vla0_trl.data.sources.lerobot_frames import TIME_TOLERANCE

# Decoding 10 s of 256 px takes 0.1 s. To frames further ahead (other processes read those between), seeking is faster.
_SEEK_AHEAD = 10.0
_SEEK_MARGIN = 1.0  # seconds; a file's index goes by decoding time, which B-frames shift against a frame's own
_FIX = "fetch the file again, or leave the episode out with --skip_bad_episodes"


class VideoReader:
    """One mp4, at a position that moves forward; going back opens it again."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps = path, fps
        self._container: av.container.InputContainer | None = None
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._position = -np.inf  # time of the last frame that was taken

    def frames(self, times: np.ndarray, name: str, alone: bool) -> Iterator[np.ndarray]:
        """The frames at `times`, ascending, in seconds of the file: uint8 (H, W, 3), decoded one at a time.

        `name` is of episode and camera, for messages. `alone`: the file has to end after the last of them.
        """
        row = 0
        try:
            self._go_to(times[0])
            codec = self._container.streams.video[0].codec_context
            check_frame_size(codec.width, codec.height, f"{name}: {self.path}")
            for row, time in enumerate(times):
                yield self._frame_at(time, row, len(times), name).to_ndarray(format="rgb24")
            extra = self._take() if alone else None
        except av.FFmpegError as error:
            self.close()
            raise EpisodeError(
                f"{name}: {self.path} does not decode at frame {row} of {len(times)} ({error.strerror}): it is "
                f"absent, cut off or damaged; {_FIX}"
            ) from error
        if extra is not None:
            self.close()
            raise EpisodeError(
                f"{name}: {self.path} goes on after the {len(times)} frames of the parquet, with one at "
                f"{extra.time:.4f} s: video and parquet have different lengths; {_FIX}"
            )

    def close(self) -> None:
        """Give the file back; a later call opens it again."""
        if self._container is not None:
            self._container.close()
        self._container, self._decoded, self._position = None, iter(()), -np.inf

    def _frame_at(self, time: float, row: int, rows: int, name: str) -> av.VideoFrame:
        tolerance = TIME_TOLERANCE / self.fps
        frame = self._take()
        while row == 0 and frame is not None and frame.time < time - tolerance:
            frame = self._take()  # of the episodes before
        if frame is not None and abs(frame.time - time) <= tolerance:
            return frame
        self.close()
        found = "the video ends before it" if frame is None else f"the next one is at {frame.time:.4f} s"
        raise EpisodeError(
            f"{name}: {self.path} has no frame at {time:.4f} s for row {row} of {rows}, {found}: it is cut off, or "
            f"video and parquet have different lengths; {_FIX}"
        )

    def _take(self) -> av.VideoFrame | None:
        frame = next(self._decoded, None)
        if frame is not None:
            self._position = frame.time
        return frame

    def _go_to(self, time: float) -> None:
        """Be before the frame at `time`."""
        if self._container is None or time < self._position + 0.5 / self.fps:
            self._open()
        if time - max(self._position, 0) > _SEEK_AHEAD:
            stream = self._container.streams.video[0]
            self._container.seek(int((time - _SEEK_MARGIN) / stream.time_base), stream=stream)
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None or first.time > time:  # an index that misleads
                self._open()
            else:
                self._decoded = chain([first], self._decoded)

    def _open(self) -> None:
        self.close()
        self._container = av.open(str(self.path))
        streams = self._container.streams.video
        if not streams or streams[0].codec_context is None:
            raise av.error.InvalidDataError(0, "no video stream that can be decoded", str(self.path))
        # --num_proc is what makes use of more cores, and every thread would keep frames.
        streams[0].codec_context.thread_count = 1
        self._decoded = self._decode()

    def _decode(self) -> Iterator[av.VideoFrame]:
        for packet in self._container.demux(self._container.streams.video[0]):
            if packet.is_corrupt:  # the file is cut off inside it, and decoders make grey pictures of what is left
                return
            yield from packet.decode()
