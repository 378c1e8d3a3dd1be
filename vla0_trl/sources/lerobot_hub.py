"""LeRobotDatasets by folder or Hub id: only the files that a conversion needs are fetched."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vla0_trl.conversion.staging import ConversionError
from vla0_trl.episodes import SourceInfo
from vla0_trl.sources.lerobot import LeRobotSource, find_keys
from vla0_trl.sources.lerobot_meta import LeRobotMeta, read_meta, wildcard


class LeRobotDataset:
    """A dataset whose `meta/` is here; `fetch` brings the rest.

    Args:
        name (`str`): a folder, or "USER/NAME" on the Hub.
        revision (`str`, *optional*): a branch, tag or commit on the Hub.

    Raises:
        ConversionError: neither folder nor dataset, or its `meta/` is none that can be read.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.hub_id = None if Path(name).is_dir() else name
        self.revision = revision
        root = Path(name)
        if self.hub_id is not None:
            root = self._download(["meta/*", "README.md"])
            # All that follows is of this commit, whatever is pushed meanwhile. The cache names folders by commit.
            self.revision = root.name if re.fullmatch("[0-9a-f]{40}", root.name) else revision
        elif revision is not None:
            raise ConversionError(f"--revision {revision}: {name} is a folder, revisions are the Hub's")
        self.meta: LeRobotMeta = read_meta(root)

    def source(
        self,
        image_keys: list[str] | None,
        state_key: str | None,
        action_key: str | None,
        check_stats: bool,
    ) -> LeRobotSource:
        """Its episodes; see [`find_keys`] and [`LeRobotSource`]."""
        keys = find_keys(self.meta, image_keys, state_key, action_key)
        version = self.meta.info["codebase_version"]
        robot = self.meta.info.get("robot_type") or "unknown"
        info = SourceInfo(
            source=self.hub_id or self.meta.root.resolve().name,
            revision=self.revision if self.hub_id and self.revision else f"sha256 of meta/: {self.meta.digest}",
            license=self._license(),
            robot=robot,
            fps=float(self.meta.info["fps"]),
            how=f"Converted from a LeRobotDataset, format {version}, recorded with {robot}.",
            options={"action": keys.action, "state": keys.state, "cameras": keys.cameras},
            in_order=True,
        )
        return LeRobotSource(self.meta, keys, info, check_stats)

    def fetch(self, source: LeRobotSource, indices: list[int], cameras: list[str]) -> None:
        """Bring what these episodes and cameras need; a folder has it all."""
        if self.hub_id is None:
            return
        videos = [key for key in (source.keys.cameras[camera] for camera in cameras) if key in self.meta.video_keys]
        if len(indices) == len(source):  # a pattern for each of many files would take minutes to match
            patterns = [wildcard(self.meta.info["data_path"])]
            patterns += [wildcard(self.meta.info["video_path"], key) for key in videos]
        else:
            episodes = [self.meta.episodes[index] for index in indices]
            patterns = [episode.data for episode in episodes]
            patterns += [episode.videos[key].path for episode in episodes for key in videos]
        self._download(list(dict.fromkeys(patterns)))

    def _download(self, patterns: list[str]) -> Path:
        try:
            return Path(
                snapshot_download(self.hub_id, repo_type="dataset", revision=self.revision, allow_patterns=patterns)
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            at = f" at revision {self.revision}" if self.revision else ""
            raise ConversionError(
                f"no folder {self.hub_id!r} here, and the Hub's dataset of that name{at} can't be read "
                f"({type(error).__name__}: {error})"
            ) from error

    def _license(self) -> str:
        """From the dataset card's header."""
        card = self.meta.root / "README.md"
        header = re.match(r"---\n(.*?)\n---", card.read_text(), re.DOTALL) if card.is_file() else None
        return (yaml.safe_load(header[1]) or {}).get("license", "unknown") if header else "unknown"
