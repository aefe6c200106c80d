"""What a hostile run, a hostile neighbour or a careless exception could get out of the server."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from drills.deaths import ERROR, UPLOADED
from drills.hub import wait_for_final
from drills.judge import DELAY_SECONDS, Drill, Run, Skip
from drills.poison import archive_of
from drills.small import Job, SmallSite
from drills.stage import Stage
from flip_observability.constants import FlareEvents, FlipEvents
from otlp_sink import OtlpSink
from poc import wait_until

GROUP = "security"
NOBODY = 65_534
BOMB_BYTES = 256 << 20
HOSTILE = 'site-1",evil="1"} 1\n# HELP evil \\ \u202e' + "x" * 10_000


def _hide_the_key(site: SmallSite, job: Job) -> Path:
    """The server's private key, and every way that a run has to point at it."""
    kit = job.run_dir.parent / "startup"
    key = kit / "server.key"
    key.write_text(f"-----BEGIN PRIVATE KEY-----\n{site.canary}\n")
    (job.run_dir / "key").symlink_to(key)
    (job.run_dir / "startup").symlink_to(kit)
    (job.run_dir / "relative").symlink_to("../startup/server.key")
    (job.run_dir / "passwd").symlink_to("/etc/passwd")
    (job.run_dir / "environ").symlink_to("/proc/self/environ")
    (job.run_dir / "app_server" / "custom" / "trainer.py").symlink_to(key)
    os.mkfifo(job.run_dir / "pipe")
    return key


def links(stage: Stage) -> Sequence[Run]:
    """Links and named pipes in the results: of a run that ends well, and of one that is salvaged."""
    site = stage.small()
    site.observer()
    well, dead = site.job().begin().train(2), site.job().begin().train(2)
    for job in (well, dead):
        _hide_the_key(site, job)
    (dead.run_dir / "harmless.txt").write_text((dead.run_dir.parent / "startup" / "server.key").read_text())
    well.end()
    runs = [well.run(finals=UPLOADED)]
    well.leave()
    runs.append(dead.run(dead.kill(), finals=ERROR))
    for run in runs:
        wait_until(functools.partial(site.archives, run.model_id), 60, "the results")
        for names in map(_names, site.archives(run.model_id).values()):
            hidden = {"key", "relative", "passwd", "environ", "pipe", "trainer.py", "harmless.txt"}
            assert not hidden & {Path(name).name for name in names}, names
    return runs


def _names(content: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.namelist()


def archives(stage: Stage) -> Sequence[Run]:
    """Archives in the job store: one that names files elsewhere and holds the key, and one that is a bomb."""
    site = stage.small()
    jobs = [site.job().begin().train(2) for _ in range(2)]
    died = max(job.kill() for job in jobs)
    stored = {job.job_id: site.home / f"{job.job_id}.zip" for job in jobs}
    key = _hide_the_key(site, jobs[0])
    for path in jobs[0].run_dir.rglob("*"):
        if path.is_symlink() or path.is_fifo():
            path.unlink()
    archive_of(jobs[0].run_dir, stored[jobs[0].job_id])
    with zipfile.ZipFile(stored[jobs[0].job_id], "a") as archive:
        for name in ("../../etc/cron.d/evil", "/etc/cron.d/evil", "a/../../evil", "C:\\evil", "evil\r\nname"):
            archive.writestr(name, "evil")
        archive.write(key, "notes.txt")  # NVFLARE follows links when it makes an archive
        link = zipfile.ZipInfo("evil-link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(key))
    with (
        zipfile.ZipFile(stored[jobs[1].job_id], "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb", "w") as bomb,
    ):
        for _ in range(BOMB_BYTES >> 20):
            bomb.write(bytes(1 << 20))
    site.observer(stored)
    runs = [jobs[0].run(died), jobs[1].run(died, results=False)]
    for run in runs:
        wait_for_final(run, DELAY_SECONDS)
    wait_until(lambda: site.archives(jobs[0].model_id), 60, "the results")
    for names in map(_names, site.archives(jobs[0].model_id).values()):
        assert {name for name in names if "evil" in name} == {"C:%5Cevil", "evil%0D%0Aname"}, names
        assert "notes.txt" not in names, names
    site.wait_for_metric("flip_observability_errors_total", component="salvage")
    return runs


def canaries(stage: Stage) -> Sequence[Run]:
    """The job's own code quotes patients and secrets wherever it can; a collector, the metrics and the hub listen."""
    with OtlpSink("http/protobuf") as sink:
        variables = {
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{sink.port}",
        }
        site = stage.small(variables=variables)
        site.observer()
        text = " ".join(site.secrets)
        job = site.job(quoting=text).begin().train(2)
        job.ask("fire", FlipEvents.SEND_RESULT.value, {"event_data": text, "__event_data": text}, text)
        job.ask("fire", FlareEvents.CLIENT_DISCONNECTED.value, {"disconnected_client_name": "site-1"})
        site.bucket.refusing = True
        job.end()
        run = job.run()
        job.leave()
        wait_for_final(run, DELAY_SECONDS)
        wait_until(lambda: any(span.name == "flip.run" for span in sink.spans), 20, "the trace")
        assert not any(secret in repr(sink.spans) for secret in site.secrets), "a span holds a secret"
        return [run]


def names(stage: Stage) -> Sequence[Run]:
    """Model, run, job and client are named by somebody who wants to break out of a label, a path or a log line."""
    site = stage.small()
    site.observer()
    job = site.job(client=HOSTILE, name=HOSTILE, job_id="no-uuid.evil").begin().train(2)
    job.end()
    run = job.run()
    job.leave()
    for refused in ({"model_id": "../../admin/keys"}, {"job_id": 'evil"} 1\n# TYPE evil gauge'}):
        with contextlib.suppress(EOFError):
            site.job(variables=None, **refused)
            raise AssertionError("such a job starts")
    wait_for_final(run, DELAY_SECONDS)
    site.wait_for_metric("flip_runs_finished_total", status="RESULTS_UPLOADED")
    families = list(text_string_to_metric_families(site.page()))
    assert all(family.name.startswith("flip_") for family in families), "a name became a metric"
    assert not any("evil" in sample.labels for family in families for sample in family.samples), "... or a label"
    assert all(len(value) < 1_000 for f in families for s in f.samples for value in s.labels.values()), "... a long one"
    assert not any(".." in record.path or "admin" in record.path for record in site.hub.records), "... or a path"
    return [run]


def files(stage: Stage) -> Sequence[Run]:
    """Another user of the machine wants to read the ledger, a spool, and results."""
    if os.geteuid() != 0:
        raise Skip("needs root, to become another user")
    stage.home.chmod(0o711)
    results = stage.home / "results"
    site = stage.small(results=results)
    site.observer()
    job = site.job().begin().train(2)
    wait_until(lambda: list(site.ledger_dir.glob("spool-*")), 10, "the room that is reserved")
    kept = [path for path in site.ledger_dir.iterdir() if path.is_file()]
    site.ledger_dir.chmod(0o755)  # the files look after themselves
    _are_private(site, kept)
    job.end()
    run = job.run()
    job.leave()
    _are_private(site, list(results.rglob("*.zip")))
    return [run]


def _are_private(site: SmallSite, paths: list[Path]) -> None:
    assert paths, "there is nothing to be read"
    for path in paths:
        assert path.stat().st_mode & 0o777 == 0o600, f"{path.name} has mode {path.stat().st_mode & 0o777:o}"
    assert site.readable_by(NOBODY, paths) == [], "another user can read files"


def endpoint(stage: Stage) -> Sequence[Run]:
    """Somebody sends what is no scrape to the metrics' endpoint, while a run goes on."""
    site = stage.small()
    observer = site.observer()
    job = site.job().begin().train(2)
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE"):
        assert _ask(observer.hello, method, {}) == 405, method
    assert _ask(observer.hello, "GET", {"X-Long": "x" * 1_000_000}) == 431
    assert _ask(observer.hello, "GET", {f"X-{number}": "x" for number in range(10_000)}) == 431
    site.wait_for_metric("flip_runs_active")
    job.end()
    run = job.run()
    job.leave()
    return [run]


def _ask(port: int, method: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, "/metrics", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


DRILLS: tuple[Drill, ...] = (
    Drill("security-links", GROUP, "links to the key, and pipes, among the results", links, results=True),
    Drill("security-archives", GROUP, "a hostile archive, and a zip bomb", archives, ERROR, True),
    Drill("security-canaries", GROUP, "exceptions and events that quote secrets", canaries, ERROR, False),
    Drill("security-names", GROUP, "hostile model, run, job and client names", names, UPLOADED, True),
    Drill("security-files", GROUP, "another user reads ledger, spool and results", files, UPLOADED, True),
    Drill("security-endpoint", GROUP, "other methods, and headers of a megabyte", endpoint, UPLOADED, True),
)
