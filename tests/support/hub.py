"""A Hugging Face Hub on loopback: the endpoints that huggingface_hub's and datasets' own clients use, and no more.

It keeps repositories in memory, as lists of commits, sends large files by redirect as the Hub's CDN does, and logs
every request. Rights are the Hub's: who may not read is told that there is nothing (404; 401 without a token), who may
not write gets 403.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from http.server import ThreadingHTTPServer

from support.hub_endpoints import LARGE, READER, STRANGER, WRITER, HubHandler, Repository, pointer

__all__ = ["READER", "STRANGER", "WRITER", "LocalHub"]


class LocalHub:
    """The server, with what it knows and what it was asked.

    Args:
        fail_uploads (`int`): the connection breaks in the middle of every upload from this one on (from 1); 0: never.
        break_downloads (`int`): as many large files arrive by half.
    """

    def __init__(self, fail_uploads: int = 0, break_downloads: int = 0):
        self.repositories: dict[tuple[str, str], Repository] = {}  # (models or datasets, id)
        self.large: dict[str, bytes] = {}  # by sha256
        self.log: list[tuple[str, str, int, int]] = []  # method, path, status, bytes of the answer
        self.fail_uploads, self.break_downloads = fail_uploads, break_downloads
        self.uploads, self.lock = 0, threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # another host, as the Hub's CDN is

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: os.PathLike, token: str | None = WRITER) -> dict[str, str]:
        """Variables for a process that is to use this Hub, with caches of its own in `home`."""
        unset = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN_PATH"), "")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def store(self, kind: str, name: str, files: dict[str, bytes]) -> Repository:
        """A public repository with these files, without a client."""
        repository = self.repositories[kind, name] = Repository(private=False)
        stored = {}
        for path, data in files.items():
            oid = hashlib.sha256(data).hexdigest()
            stored[path] = pointer(oid, len(data)) if path.endswith(LARGE) else data
            if path.endswith(LARGE):
                self.large[oid] = data
        repository.commit("files", stored)
        return repository

    def requests(self, pattern: str) -> list[tuple[str, str, int, int]]:
        """What was asked with a method and path that match."""
        return [entry for entry in self.log if re.search(pattern, f"{entry[0]} {entry[1]}")]
