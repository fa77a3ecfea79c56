"""Which model answers: found by version, loaded beside the one in use, and put in its place in one step.

``--run`` is one run folder, whose version is then the only one, or a folder of them, of which the one that the store
has published answers. A request keeps the model it began with.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from vista.checkpoint import POPULARITY, VERSION_FILES, Run, load_run, model_version
from vista.errors import CheckpointError, StoreError, VistaError
from vista.serving.cache import TokenCache
from vista.serving.context import ContextReader
from vista.serving.logs import say
from vista.serving.metrics import Metrics
from vista.serving.options import ServeOptions
from vista.serving.scorer import Scorer
from vista.store.contract import SummaryStore, shown

Mark = tuple[int, int]  # a file's time of change, in ns, and its size


@dataclass(frozen=True, eq=False)
class Model:
    """A model that answers."""

    run: Run
    scorer: Scorer
    context: ContextReader
    popularity: Mark | None = None  # of the file that the scorer's table was read from

    @property
    def version(self) -> str:
        return self.run.version


class Deployment:
    """The model in use, and the store; looks every ``watch_s`` seconds whether either has changed."""

    def __init__(self, options: ServeOptions, store: SummaryStore, metrics: Metrics) -> None:
        """Load the first model. Raises CheckpointError or StoreError where run and store do not match."""
        self.options, self.store, self._metrics = options, store, metrics
        self.is_store_up, self._problem = True, ""
        self._runs = RunFolders(options.run)
        self._ended = threading.Event()
        self.model = self._load(self._runs.only or self._published())
        metrics.serve_version(self.model.version)
        self._thread = threading.Thread(target=self._watch, name="vista-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _published(self) -> str:
        version = self.store.published()
        if version is None:
            raise StoreError(
                f"{shown(self.options.store)}: no version is published; run: vista summarize, or vista store publish"
            )
        return version

    def _load(self, version: str) -> Model:
        run = load_run(self._runs.folder_of(version))
        check_match(run, self.store, shown(self.options.store))
        cache = TokenCache(self.options.cache_users, self.options.cache_ttl_s) if self.options.cache_users else None
        return self._model(run, cache)

    def _model(self, run: Run, cache: TokenCache | None) -> Model:
        popularity = mark_of(run.folder / POPULARITY)  # before it is read: what comes meanwhile is read again
        return Model(run, Scorer(run, self.store, cache), ContextReader.of(run.schema), popularity)

    def _watch(self) -> None:
        while not self._ended.wait(self.options.watch_s):
            try:
                self.look()
            except Exception as error:  # whatever it is, the next look must come
                self._report("cannot look at store and runs", error)

    def _report(self, what: str, error: Exception, **facts: str) -> None:
        """Log a problem, and not again while it stays the same."""
        text = str(error) if isinstance(error, VistaError) else f"{type(error).__name__}: {error}"
        if text != self._problem:
            say(what, problem=text, **facts)
        self._problem = text

    def look(self) -> None:
        """Ask the store which version is published, and go over to it where that is another one; read the table of
        popularity where it was made anew."""
        try:
            published = self.store.published()
        except VistaError as error:
            self._became(False, str(error))
            return
        self._became(True, "")
        if self._runs.only is None and published not in (None, self.model.version):
            self._switch(published)
        now = mark_of(self.model.run.folder / POPULARITY)
        if now not in (None, self.model.popularity):
            self._refresh()

    def _became(self, is_up: bool, problem: str) -> None:
        if is_up != self.is_store_up:
            say("store is back" if is_up else "store is away", problem=problem)
        self.is_store_up = is_up

    def _switch(self, version: str) -> None:
        """Until another version can be loaded and matches, the one in use goes on answering."""
        try:
            model = self._load(version)
        except VistaError as error:
            self._report("version cannot be served", error, version=version)
            return
        before, self.model, self._problem = self.model.version, model, ""
        self._metrics.serve_version(version)
        self._metrics.switches.inc()
        say("switched", version=version, before=before)

    def _refresh(self) -> None:
        """The same model with the table of popularity that is there now; where it cannot be read, the old one."""
        try:
            self.model = self._model(self.model.run, self.model.scorer.cache)
        except VistaError as error:
            self._report("popularity cannot be read", error)
            return
        self._problem = ""
        say("popularity was read anew", version=self.model.version)


class RunFolders:
    """A run folder, or a folder of run folders, by model version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not there, or is no folder; give a run folder or a folder of run folders")
        self._known: dict[Path, tuple[list[Mark | None], str]] = {}
        self.only = model_version(path) if _is_run(path) else None

    def folder_of(self, version: str) -> Path:
        """The folder of a version. Raises CheckpointError where none has it."""
        if version == self.only:
            return self.path
        found: dict[str, Path] = {}
        unreadable = ""
        for folder in self._folders():
            try:
                found[self._version_of(folder)] = folder
            except CheckpointError as error:  # as while it is being copied
                unreadable = f" ({error})"
        if version not in found:
            raise CheckpointError(
                f"{self.path}: no run has version {version}, which the store has published; its runs have "
                f"{', '.join(sorted(found)) or 'none'}{unreadable}: put the run folder there, or publish one of these"
            )
        return found[version]

    def _folders(self) -> list[Path]:
        try:
            return [folder for folder in sorted(self.path.iterdir()) if _is_run(folder)]
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error}); give it back, or start the server anew"
            ) from error

    def _version_of(self, folder: Path) -> str:
        """Reads what a version is made of only where a file of it is another than before."""
        marks = [mark_of(folder / name) for name in VERSION_FILES]
        known = self._known.get(folder)
        if known is None or known[0] != marks:
            self._known[folder] = known = marks, model_version(folder)
        return known[1]


def mark_of(path: Path) -> Mark | None:
    """What tells a file from the one before it; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _is_run(folder: Path) -> bool:
    return all((folder / name).exists() for name in VERSION_FILES)


def check_match(run: Run, store: SummaryStore, place: str) -> None:
    """Raise StoreError where a store does not hold what a model reads."""
    known = {info.version: info for info in store.versions()}
    if run.version not in known:
        raise StoreError(
            f"{place} has no version {run.version} of {run.folder}, it has {', '.join(known) or 'none'}; run: vista "
            f"summarize {run.folder} --data DATA --store {place}, or serve the run that the store was made with"
        )
    info = known[run.version]
    shape = tuple(run.sequence_model.empty_summary(1).shape[1:])
    if (info.num_tokens, info.width) != shape:
        raise StoreError(
            f"{place}: version {run.version} has {info.num_tokens} x {info.width} tokens, the model of {run.folder} "
            f"{shape[0]} x {shape[1]}; summarize again"
        )
