"""Installing into server kits that NVFLARE itself made."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.common.excepts import ComponentNotAuthorized
from nvflare.fuel.sec.security_content_service import SecurityContentService
from nvflare.fuel.utils.class_loader import load_class
from nvflare.lighter.utils import load_private_key, sign_folders, verify_folder_signature
from nvflare.private.fed.app.fl_conf import FLServerStarterConfiger
from nvflare.private.fed.server.server_json_config import ServerJsonConfigurator
from nvflare.private.fed.utils.fed_utils import _check_secure_content, authorize_build_component

import server_kit
from command_line import flip_obs
from flip_observability import editing
from flip_observability.component_paths import CLASS_OF
from flip_observability.nvflare import install
from flip_observability.nvflare.install import EditError
from server_kit import snapshot

OURS = "flip_observability.nvflare.components.ServerEventHandler"
OBSERVER = "local/flip_observability__p_resources.json"
DEFAULT = "local/resources.json.default"


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_kit.poc_kits(tmp_path_factory.mktemp("poc"))


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_kit.provisioned_kits(tmp_path_factory.mktemp("provision"))


@pytest.fixture(params=["poc", "provisioned"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kits: Path = request.getfixturevalue(request.param)
    name = {"poc": "server", "provisioned": "server1"}[request.param]
    return server_kit.copy_of(kits / name, tmp_path / "server")


@pytest.fixture
def poc_kit(poc: Path, tmp_path: Path) -> Path:
    return server_kit.copy_of(poc / "server", tmp_path / "server")


def put_in(kit: Path) -> editing.Plan:
    wanted = install.plan(kit)
    wanted.apply()
    return wanted


def take_out(kit: Path) -> editing.Plan:
    wanted = install.plan_undo(kit)
    wanted.apply()
    return wanted


def allowed(kit: Path, path: str) -> bool:
    """Ask NVFLARE's own authorizer, for a job without custom code."""
    fl_ctx = FLContext()
    fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(kit), "server"), private=True, sticky=False)
    fl_ctx.set_prop(FLContextKey.COMPONENT_CONFIG, {"path": path}, private=True, sticky=False)
    try:
        ComponentPathAuthorizer().handle_event("_before_build_component", fl_ctx)
    except UnsafeComponentError:
        return False
    return True


def configured(kit: Path, *, job: bool) -> dict[str, Any]:
    """What NVFLARE reads when the parent, or a job's process, starts from this kit."""
    args = Namespace(workspace=str(kit), job_id="a-job" if job else None, set=[])
    return dict(FLServerStarterConfiger(Workspace(str(kit), "server"), args).config_data)


def build(kit: Path, component: dict[str, Any]) -> Any:
    """Have NVFLARE configure a job without custom code from this kit, as its job process does."""
    app = kit / "a-job" / "app_server"
    (app / "config").mkdir(parents=True, exist_ok=True)
    (kit / "a-job" / "meta.json").write_text("{}")
    file = app / "config" / "config_fed_server.json"
    workflow = {"id": "work", "path": "nvflare.app_common.workflows.fedavg.FedAvg", "args": {"num_clients": 1}}
    file.write_text(json.dumps({"format_version": 2, "components": [component], "workflows": [workflow]}))
    args = Namespace(workspace=str(kit), job_id="a-job", set=[])
    workspace = Workspace(str(kit), "server")
    fl_ctx = FLContext()
    fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True)
    fl_ctx.set_prop(FLContextKey.CURRENT_JOB_ID, "a-job", private=False, sticky=False)
    configurator = ServerJsonConfigurator(workspace, str(file), args, str(app))
    configurator.set_component_build_authorizer(authorize_build_component, fl_ctx=fl_ctx, event_handlers=[])
    configurator.configure()
    return configurator.runner_config.components[component["id"]]


def ids(configuration: dict[str, Any]) -> list[str]:
    return [component["id"] for component in configuration["components"]]


# -- what comes in with a job ----------------------------------------------------------------------------------------

NOT_OURS_TO_OFFER = [
    "flip_observability._archive.ZipFile",
    "flip_observability.cli.app",
    "flip_observability.nvflare.server_observer.ServerObserver",
    "flip_observability.nvflare.components.persist_to_s3_and_cleanup.traceback",
    "flip_observability.nvflare.components.server_event_handler.FLIP",
    "flip_observability.nvflare.components.components.ServerEventHandler",
    "flip_observability_evil.Class",
]


def test_a_job_cannot_write_over_the_servers_key(poc_kit: Path) -> None:
    """Whatever a module of ours imports was a class of a job's, with arguments of its own."""
    key = poc_kit / "startup" / "server.key"
    before = key.read_bytes()
    put_in(poc_kit)
    evil = {"id": "x", "path": "flip_observability._archive.ZipFile", "args": {"file": str(key), "mode": "w"}}
    with pytest.raises(ComponentNotAuthorized, match="is not in allow_list"):
        build(poc_kit, evil)
    inside = {"id": "x", "path": OURS, "args": {"flip": evil}}
    for disguise in ({}, {"config_type": "component"}, {"class_path": "x.Y"}, {"name": "x"}):
        with pytest.raises(ComponentNotAuthorized):
            build(poc_kit, {**inside, "args": {"flip": {**evil, **disguise}}})
    assert key.read_bytes() == before


@pytest.mark.parametrize("path", NOT_OURS_TO_OFFER)
def test_nothing_of_ours_but_the_components_is_let_in(kit: Path, path: str) -> None:
    put_in(kit)
    assert not allowed(kit, path)


@pytest.mark.parametrize("path", CLASS_OF)
def test_every_path_of_a_component_is_let_in_and_nothing_below_it_can_be_loaded(
    kit: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_DEV", "true")
    put_in(kit)
    assert type(build(kit, {"id": "x", "path": path, "args": {}})).__name__ == CLASS_OF[path]
    for attribute in ("__init__", "handle_event", "__init__.__globals__", "os"):
        assert allowed(kit, f"{path}.{attribute}")  # NVFLARE takes an entry for all that begins with it and a dot
        with pytest.raises(TypeError, match="Can't load class"):
            load_class(f"{path}.{attribute}")


@pytest.mark.parametrize("entry", ["flip_observability.", "flip_observability.nvflare.components"])
def test_the_wide_entry_of_an_earlier_version_is_replaced_and_does_not_come_back(kit: Path, entry: str) -> None:
    source = next(file for file in (kit / "local" / "resources.json", kit / DEFAULT) if file.exists())
    content = json.loads(source.read_text())
    before = content["class_allow_list"]
    (kit / "local" / "resources.json").write_text(
        json.dumps({**content, "class_allow_list": [before[0], entry, *before[1:]]}, indent=4)
    )
    assert allowed(kit, NOT_OURS_TO_OFFER[-3])
    assert entry in "\n".join(put_in(kit).lines)
    assert json.loads((kit / "local" / "resources.json").read_text())["class_allow_list"] == [*before, *CLASS_OF]
    take_out(kit)
    left = kit / "local" / "resources.json"
    assert json.loads((left if left.exists() else kit / DEFAULT).read_text())["class_allow_list"] == before


def test_the_true_original_comes_back_after_an_upgrade(poc_kit: Path) -> None:
    before = snapshot(poc_kit)
    file = poc_kit / "local" / "resources.json"
    original, content = file.read_bytes(), json.loads(file.read_text())
    content["class_allow_list"].append("flip_observability.")
    file.write_text(json.dumps(content))
    editing.backup_name(file, file.read_bytes()).write_bytes(original)
    put_in(poc_kit)
    assert len(editing.originals(file)) == 1
    take_out(poc_kit)
    assert snapshot(poc_kit) == before


# -- what NVFLARE makes of it ----------------------------------------------------------------------------------------


def test_jobs_may_name_our_components_and_the_parent_has_the_observer(kit: Path) -> None:
    known = "nvflare.app_common.workflows.fedavg.FedAvg"
    assert (allowed(kit, OURS), allowed(kit, known), allowed(kit, "evil.Class")) == (False, True, False)
    before = ids(configured(kit, job=False))
    put_in(kit)
    assert (allowed(kit, OURS), allowed(kit, known), allowed(kit, "evil.Class")) == (True, True, False)
    assert ids(configured(kit, job=False)) == [*before, "flip_server_observer"]
    assert ids(configured(kit, job=True)) == before


def test_flips_own_component_of_the_parent_stays_beside_ours(kit: Path) -> None:
    # As FLIP's image writes it at each start of the server: it tells the hub why a job cannot be scheduled.
    reporter = {"id": "flip_job_scheduling_reporter", "path": "flip.nvflare.components.x.JobSchedulingReporter"}
    file = kit / "local" / "flip__p_resources.json"
    content = json.dumps({"components": [reporter | {"args": {}}]}, indent=2) + "\n"
    file.write_text(content)
    put_in(kit)
    assert {"flip_job_scheduling_reporter", "flip_server_observer"} <= set(ids(configured(kit, job=False)))
    assert file.read_text() == content
    file.write_text(content)  # the next start
    assert not put_in(kit).edits
    take_out(kit)
    assert file.read_text() == content


def test_once_and_twice_and_undone(kit: Path) -> None:
    before = snapshot(kit)
    assert put_in(kit).edits
    once = snapshot(kit)
    assert once != before
    assert {name for name in once if once[name] != before.get(name)} - before.keys() >= {OBSERVER}
    assert not put_in(kit).edits
    assert snapshot(kit) == once
    take_out(kit)
    assert snapshot(kit) == before
    assert not take_out(kit).edits
    assert snapshot(kit) == before


def test_only_the_entries_are_added(poc_kit: Path) -> None:
    file = poc_kit / "local" / "resources.json"
    before = file.read_text().splitlines()
    put_in(poc_kit)
    after = file.read_text().splitlines()
    place = next(index for index, line in enumerate(after) if line not in before)
    added = after[place + 1 : place + 1 + len(CLASS_OF)]
    assert [line.strip().strip(',"') for line in added] == [*CLASS_OF]
    assert [*after[:place], after[place].rstrip(","), *after[place + 1 + len(CLASS_OF) :]] == before


def test_a_site_with_defaults_alone_gets_a_list_of_its_own(provisioned: Path, tmp_path: Path) -> None:
    kit = server_kit.copy_of(provisioned / "server1", tmp_path / "server")
    os.chmod(kit / "local" / "resources.json.default", 0o640)
    default = (kit / "local" / "resources.json.default").read_bytes()
    put_in(kit)
    own = kit / "local" / "resources.json"
    assert (kit / "local" / "resources.json.default").read_bytes() == default
    assert own.stat().st_mode & 0o777 == 0o640
    own_content, default_content = json.loads(own.read_text()), json.loads(default)
    default_content["class_allow_list"] += CLASS_OF
    assert own_content == default_content


def test_a_kit_without_a_list_keeps_what_nvflare_allows_by_default(poc_kit: Path) -> None:
    file = poc_kit / "local" / "resources.json"
    content = json.loads(file.read_text())
    del content["class_allow_list"]
    file.write_text(json.dumps(content, indent=2))
    before = snapshot(poc_kit)
    put_in(poc_kit)
    assert json.loads(file.read_text())["class_allow_list"] == [*DEFAULT_CLASS_ALLOW_LIST, *CLASS_OF]
    assert allowed(poc_kit, OURS)
    take_out(poc_kit)
    assert snapshot(poc_kit) == before


@pytest.mark.parametrize("entries", [["*"], [*CLASS_OF], [*reversed(CLASS_OF), "x.y"]])
def test_what_is_allowed_already_is_left_alone(poc_kit: Path, entries: list[str]) -> None:
    file = poc_kit / "local" / "resources.json"
    content = json.loads(file.read_text())
    content["class_allow_list"] += entries
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    put_in(poc_kit)
    assert file.read_bytes() == before
    assert (poc_kit / OBSERVER).exists()


def test_an_edit_since_survives_the_undo(poc_kit: Path) -> None:
    file = poc_kit / "local" / "resources.json"
    wanted = json.loads(file.read_text())
    put_in(poc_kit)
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 2, "mine": 1'))
    undone = take_out(poc_kit)
    assert "edited since" in undone.warnings[0]
    assert json.loads(file.read_text()) == {**wanted, "mine": 1}
    assert not list(file.parent.glob("*flip*"))


def test_a_kit_made_anew_is_installed_anew(poc_kit: Path) -> None:
    put_in(poc_kit)
    file = poc_kit / "local" / "resources.json"
    content = json.loads(file.read_text())
    content["class_allow_list"] = ["nvflare."]
    file.write_text(json.dumps(content))
    fresh = file.read_bytes()
    put_in(poc_kit)
    assert len(editing.originals(file)) == 1
    take_out(poc_kit)
    assert file.read_bytes() == fresh


def test_somebody_elses_arguments_stay_until_the_undo(poc_kit: Path) -> None:
    put_in(poc_kit)
    file = poc_kit / OBSERVER
    file.write_text(file.read_text().replace('"args": {}', '"args": {"port": 9999}'))
    edited = file.read_bytes()
    assert not put_in(poc_kit).edits
    assert file.read_bytes() == edited
    assert "arguments" in take_out(poc_kit).warnings[0]
    assert not file.exists()


def test_an_observer_configured_elsewhere_is_enough(poc_kit: Path) -> None:
    other = poc_kit / "local" / "site__p_resources.json"
    other.write_text(json.dumps({"components": [{**install.COMPONENT, "id": "mine"}]}))
    assert "has the observer already" in put_in(poc_kit).warnings[0]
    assert not (poc_kit / OBSERVER).exists()


# -- what is refused -------------------------------------------------------------------------------------------------


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda kit: (kit / name).write_text(content)


def without_resources(kit: Path) -> None:
    for file in kit.glob("local/resources.json*"):
        file.unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no startup": (lambda kit: shutil.rmtree(kit / "startup"), "is no server kit"),
    "no local": (lambda kit: shutil.rmtree(kit / "local"), "no local folder"),
    "no resources": (without_resources, "no server starts from it"),
    "broken JSON": (write("local/resources.json", '{"class_allow_list": ["a.b"'), "is no valid JSON"),
    "a key twice": (write("local/resources.json", '{"class_allow_list": [], "class_allow_list": []}'), "stands twice"),
    "a list": (write("local/resources.json", "[]"), "holds no object"),
    "null as the list": (write("local/resources.json", '{"class_allow_list": null}'), "is no list"),
    "an object as the list": (write("local/resources.json", '{"class_allow_list": {}}'), "is no list"),
    "a byte order mark": (write("local/resources.json", "\ufeff{}"), "byte order mark"),
    "somebody else's file": (write(OBSERVER, '{"components": [{"id": "x", "path": "a.B"}]}'), "is not ours"),
    "the id is taken": (
        write("local/x__resources.json", '{"components": [{"id": "flip_server_observer", "path": "a.B"}]}'),
        "another component with the id",
    ),
    "a confidential VM": (write("signature.json", "{}"), "signed as a whole"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_nothing_changed(poc_kit: Path, case: str) -> None:
    spoil, reason = REFUSED[case]
    spoil(poc_kit)
    before = snapshot(poc_kit)
    with pytest.raises(EditError, match=reason):
        put_in(poc_kit)
    assert snapshot(poc_kit) == before


def test_other_folders_are_named_for_what_they_are(poc: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"did you mean .*/prod_00/server\?"):
        install.plan(poc.parent.parent)
    with pytest.raises(EditError, match="kit of a client"):
        install.plan(poc / "site-1")
    with pytest.raises(EditError, match="kit of an admin"):
        install.plan(poc / "admin@nvidia.com")
    with pytest.raises(EditError, match="does not exist"):
        install.plan(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(EditError, match="is no folder"):
        install.plan(tmp_path / "file")


def test_more_than_the_observer_is_not_removed(poc_kit: Path) -> None:
    put_in(poc_kit)
    file = poc_kit / OBSERVER
    content = json.loads(file.read_text())
    content["components"].append({"id": "mine", "path": "a.B"})
    file.write_text(json.dumps(content))
    before = snapshot(poc_kit)
    with pytest.raises(EditError, match="holds more than the observer"):
        take_out(poc_kit)
    assert snapshot(poc_kit) == before


def test_a_working_copy_is_refused(poc_kit: Path) -> None:
    """``start.sh`` copies a kit to ``<workspace>/kit`` when ``NVFL_WORKSPACE`` is set, at every start anew."""
    work = poc_kit.parent / "work"
    server_kit.copy_of(poc_kit, work / "kit")
    for name in ("startup", "local"):
        (work / name).symlink_to(work / "kit" / name)
    with pytest.raises(EditError, match="working copy"):
        install.plan(work)


def test_links_inside_are_followed_and_links_out_are_refused(poc_kit: Path, tmp_path: Path) -> None:
    file = poc_kit / "local" / "resources.json"
    inside = poc_kit / "local" / "data.json"
    file.rename(inside)
    file.symlink_to("data.json")
    before = snapshot(poc_kit)
    put_in(poc_kit)
    assert file.is_symlink()
    assert OURS in json.loads(inside.read_text())["class_allow_list"]
    take_out(poc_kit)
    assert snapshot(poc_kit) == before
    outside = tmp_path / "shared.json"
    inside.rename(outside)
    file.unlink()
    file.symlink_to(outside)
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match="outside of"):
        put_in(poc_kit)
    assert snapshot(tmp_path) == before


# -- signatures ------------------------------------------------------------------------------------------------------


def test_kits_are_not_signed_unless_for_he_and_then_only_startup_is_checked(
    provisioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = server_kit.copy_of(provisioned / "server1", tmp_path / "server")
    assert not list(kit.rglob("signature.json"))
    state = json.loads((provisioned.parent / "state" / "cert.json").read_text())
    key = load_private_key(state["root_pri_key"])
    for folder in ("startup", "local"):  # as NVFLARE does for a kit with homomorphic encryption
        sign_folders(str(kit / folder), key, signature_file="signature.json")

    def local_is_signed() -> bool:
        root = str(kit / "startup" / "rootCA.pem")
        return bool(verify_folder_signature(str(kit / "local"), root, True, "signature.json"))

    assert local_is_signed()
    assert "signed" in put_in(kit).warnings[0]
    assert not local_is_signed()
    monkeypatch.setattr(SecurityContentService, "security_content_manager", None)
    SecurityContentService.initialize(content_folder=str(kit / "startup"))
    assert _check_secure_content("server") == []  # what a server that starts looks at
    unsigned = kit / "startup" / "x__p_resources.json"
    unsigned.write_text("{}")
    assert _check_secure_content("server") == [str(unsigned)]
    monkeypatch.setattr(SecurityContentService, "security_content_manager", None)
    take_out(kit)
    assert local_is_signed()


# -- disks, rights, processes ----------------------------------------------------------------------------------------


INSTALL = "import sys; from flip_observability.cli import main; sys.argv = ['flip-obs', *sys.argv[1:]]; main()"


def in_a_process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", INSTALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)


def test_a_full_disk_leaves_everything_as_it_was(poc_kit: Path) -> None:
    before = snapshot(poc_kit)

    def little_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = in_a_process("install", poc_kit, preexec_fn=little_space)
    assert (done.returncode, done.stdout) == (1, "")
    assert "resources.json cannot be changed: File too large" in done.stderr
    assert snapshot(poc_kit) == before


def test_failing_at_the_second_file_puts_the_first_one_back(poc_kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = snapshot(poc_kit), os.replace

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith("p_resources.json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    wanted = install.plan(poc_kit)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(EditError, match="No space left on device"):
        wanted.apply()
    assert snapshot(poc_kit) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(poc_kit: Path) -> None:
    (poc_kit / "local").chmod(0o555)
    before = snapshot(poc_kit)
    with pytest.raises(EditError, match="run this as its owner"):
        put_in(poc_kit)
    assert snapshot(poc_kit) == before
    (poc_kit / "local").chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_file_system(poc_kit: Path) -> None:
    local = str(poc_kit / "local")
    if subprocess.run(["mount", "--bind", local, local], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let tests mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", local], check=True)
        before = snapshot(poc_kit)
        with pytest.raises(EditError, match="Read-only file system"):
            put_in(poc_kit)
        assert snapshot(poc_kit) == before
    finally:
        subprocess.run(["umount", "--lazy", local], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another owner need root")
def test_owner_and_mode_stay_with_the_files(poc_kit: Path) -> None:
    file = poc_kit / "local" / "resources.json"
    os.chown(file, 4321, 1234)
    os.chmod(file, 0o640)
    before = snapshot(poc_kit)
    put_in(poc_kit)
    for path in (file, poc_kit / OBSERVER):
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (4321, 1234, 0o640)
    take_out(poc_kit)
    assert snapshot(poc_kit) == before


def test_file_systems_without_hard_links(poc_kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    before = snapshot(poc_kit)
    put_in(poc_kit)
    take_out(poc_kit)
    assert snapshot(poc_kit) == before


def test_what_a_killed_process_left_is_cleared(poc_kit: Path) -> None:
    before = snapshot(poc_kit)
    wanted = install.plan(poc_kit)
    first = wanted.edits[0]
    left = poc_kit / "local" / ".resources.json.abc.flip-obs-tmp"
    left.touch()
    os.utime(left, (1, 1))
    kept = editing.backup_name(first.path, first.after or b"")
    os.link(first.path, kept)  # killed after keeping the original, before replacing the file
    put_in(poc_kit)
    take_out(poc_kit)
    assert snapshot(poc_kit) == before
    os.link(first.path, kept)
    take_out(poc_kit)
    assert snapshot(poc_kit) == before


def test_several_at_once_are_as_one(poc_kit: Path) -> None:
    before = snapshot(poc_kit)
    command = [sys.executable, "-c", INSTALL, "install", str(poc_kit)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    content = json.loads((poc_kit / "local" / "resources.json").read_text())
    assert content["class_allow_list"].count(OURS) == 1
    take_out(poc_kit)
    assert snapshot(poc_kit) == before


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_does(poc_kit: Path) -> None:
    before = snapshot(poc_kit)
    dry = flip_obs("install", poc_kit, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert f'+        "{OURS}"' in dry.stdout
    assert "2 of the kit's files would change." in dry.stdout
    check = flip_obs("install", poc_kit, "--check")
    assert (check.returncode, check.stdout) == (1, dry.stdout)
    assert snapshot(poc_kit) == before
    assert "Restart the server" in flip_obs("install", poc_kit).stdout
    again = flip_obs("install", poc_kit, "--check")
    assert (again.returncode, again.stdout) == (0, "Installed already; nothing to change.\n")
    assert flip_obs("install", poc_kit, "--undo", "--check").returncode == 1
    assert flip_obs("install", poc_kit, "--undo").returncode == 0
    assert snapshot(poc_kit) == before
    assert flip_obs("install", poc_kit, "--undo").stdout == "Nothing to undo.\n"
    refused = flip_obs("install", poc_kit.parent)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is no server kit" in refused.stderr


# -- any spelling ----------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    others=st.dictionaries(TEXTS.filter(lambda key: key not in ("class_allow_list", "components")), VALUES, max_size=4),
    entries=st.none() | st.lists(st.sampled_from(["a.", "nvflare.", "ü.é", "x.]y[", 'q".', "{.}"]), max_size=4),
    indent=st.sampled_from([None, 0, 1, 2, 4, "\t"]),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    ended=st.booleans(),
)
def test_any_json_is_edited_and_restored(
    tmp_path_factory: pytest.TempPathFactory,
    others: dict[str, Any],
    entries: list[str] | None,
    indent: Any,
    ascii_only: bool,
    newline: str,
    ended: bool,
) -> None:
    data = others if entries is None else {**others, "class_allow_list": entries}
    kit = tmp_path_factory.mktemp("kit")
    (kit / "startup").mkdir()
    (kit / "local").mkdir()
    (kit / "startup" / "fed_server.json").touch()
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only) + "\n" * ended
    try:
        before = text.replace("\n", newline).encode()
    except UnicodeEncodeError:
        return  # half a character that is not escaped is no UTF-8
    file = kit / "local" / "resources.json"
    file.write_bytes(before)
    put_in(kit)
    after = file.read_bytes().decode()
    changed = json.loads(after)
    assert changed.pop("class_allow_list") == [*(DEFAULT_CLASS_ALLOW_LIST if entries is None else entries), *CLASS_OF]
    assert repr(changed) == repr({key: data[key] for key in data if key != "class_allow_list"})
    if b"\r\n" in before:
        assert after.replace("\r\n", "").count("\n") == 0
    take_out(kit)
    assert file.read_bytes() == before
    shutil.rmtree(kit)
