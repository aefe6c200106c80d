"""Adopting FLIP's jobs: what is changed and what is not, in the forms that NVFLARE reads, and back again."""

from __future__ import annotations

import http.server
import json
import operator
import os
import random
import stat
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.workspace import Workspace
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.private.fed.server.server_json_config import ServerJsonConfigurator

from command_line import flip_obs
from flip_observability import editing
from flip_observability.component_paths import CLASS_OF, TO_OURS
from flip_observability.demo import job as demo_job
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.editing import Plan
from flip_observability.nvflare import adopt, components, config_text
from flip_observability.nvflare.adopt import EditError
from server_kit import snapshot

MODEL_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
FLIPS, OURS = "flip.nvflare.components", "flip_observability.nvflare.components"


def component(name: str, path: str, **args: Any) -> dict[str, Any]:
    return {"id": name, "path": path, "args": args}


PERSISTOR = component("persistor", "nvflare.app_common.np.np_model_persistor.NPModelPersistor")
FEDAVG = component("fedavg", "nvflare.app_common.workflows.fedavg.FedAvg", num_clients=2, num_rounds=3)


def flip_app(generator: str = "ValidationJsonGenerator", package: str = FLIPS) -> dict[str, Any]:
    """A server configuration as FLIP's own jobs have it: the handler is not the last one."""
    return {
        "format_version": 2,
        "model_id": MODEL_ID,
        "task_data_filters": [],
        "components": [
            PERSISTOR,
            component("model_locator", f"{FLIPS}.PTModelLocator", model={"path": "models.get_model"}),
            component("json_generator", f"{package}.{generator}"),
            component("flip_server_event_handler", f"{package}.ServerEventHandler", model_id="{model_id}"),
            component("persist_and_cleanup", f"{package}.PersistToS3AndCleanup", persistor_id="persistor"),
        ],
        "workflows": [component("init", "flip.nvflare.controllers.InitTraining", min_clients=2), FEDAVG],
    }


def adopted(app: dict[str, Any]) -> dict[str, Any]:
    """What it is to become, told apart from how the code does it."""
    names = {"ServerEventHandler", "PersistToS3AndCleanup", "ValidationJsonGenerator", "EvaluationJsonGenerator"}
    listed = []
    for item in app["components"]:
        name = item["path"].rsplit(".", 1)[1]
        listed.append({**item, "path": f"{OURS}.{name}"} if name in names else item)
    listed.sort(key=lambda item: item["path"].endswith("ServerEventHandler"))
    return {**app, "components": listed}


def make(folder: Path, text: str, name: str = "config_fed_server.json", app: str = "app") -> Path:
    """A job folder with this server configuration; the configuration's file is returned."""
    config = folder / app / "config"
    config.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"name": "job", "deploy_map": {app: ["@ALL"]}, "min_clients": 1}))
    (config / "config_fed_client.json").write_text('{"format_version": 2, "executors": []}')
    file = config / name
    file.write_bytes(text.encode())
    return file


def do(job: Path, **more: Any) -> Plan:
    wanted = adopt.plan(job, **more)
    wanted.apply()
    return wanted


def undo(job: Path) -> Plan:
    wanted = adopt.plan_undo(job)
    wanted.apply()
    return wanted


def loaded(file: Path) -> Any:
    """What NVFLARE's own factory reads."""
    config = ConfigFactory.load_config(str(file))
    assert config is not None
    return config.to_dict()


def notes(wanted: Plan) -> str:
    return "\n".join(wanted.lines)


# -- FLIP's jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["ValidationJsonGenerator", "EvaluationJsonGenerator"])
@pytest.mark.parametrize("package", [FLIPS, "flip.components"])
def test_flips_components_become_ours_and_the_handler_is_last(tmp_path: Path, generator: str, package: str) -> None:
    app = flip_app(generator, package)
    file = make(tmp_path, json.dumps(app, indent=2))
    do(tmp_path)
    assert json.loads(file.read_text()) == adopted(app)
    assert list(json.loads(file.read_text())) == list(app)


def test_modules_that_exported_recipes_name(tmp_path: Path) -> None:
    app = flip_app()
    wanted = adopted(app)
    modules = ("validation_json_generator", "flip_server_event_handler", "persist_and_cleanup")
    for item, module in zip(app["components"][2:], modules, strict=True):
        item["path"] = f"{FLIPS}.{module}.{item['path'].rsplit('.', 1)[1]}"
    file = make(tmp_path, json.dumps(app, indent=2))
    do(tmp_path)
    assert json.loads(file.read_text()) == wanted


def test_the_table_names_classes_that_exist() -> None:
    assert {path.rsplit(".", 1)[1] for path in TO_OURS.values()} == set(components.__all__)
    for path, name in CLASS_OF.items():
        module, attribute = path.rsplit(".", 1)
        found = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert found is getattr(components, name)


def test_every_app_of_a_job_is_changed(tmp_path: Path) -> None:
    files = [make(tmp_path, json.dumps(flip_app(), indent=i), app=f"app{i}") for i in (1, 2)]
    make(tmp_path, "{}", app="client_app").unlink()
    assert [edit.path for edit in do(tmp_path).edits] == files
    assert all(json.loads(file.read_text()) == adopted(flip_app()) for file in files)


def test_an_app_without_a_job_around_it(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app()))
    do(tmp_path / "app")
    assert json.loads(file.read_text()) == adopted(flip_app())


def test_once_and_twice_and_undone(tmp_path: Path) -> None:
    make(tmp_path, json.dumps(flip_app(), indent=4))
    before = snapshot(tmp_path)
    do(tmp_path)
    once = snapshot(tmp_path)
    assert not do(tmp_path).edits
    assert snapshot(tmp_path) == once
    undo(tmp_path)
    assert snapshot(tmp_path) == before
    assert not undo(tmp_path).edits


def test_all_else_stays_as_it_was_written(tmp_path: Path) -> None:
    text = json.dumps(flip_app(), indent="\t").replace("\n", "\r\n").replace(MODEL_ID, "ümläut \\u00e9")
    text = text.replace('"task_data_filters": []', '"task_data_filters" :[ ]')
    file = make(tmp_path, text)
    do(tmp_path)
    after = file.read_bytes().decode()
    assert sorted(after.replace(OURS, FLIPS).split("\r\n")) == sorted(text.split("\r\n"))
    assert '"task_data_filters" :[ ]' in after
    assert "ümläut \\u00e9" in after


def test_the_apps_own_code_is_looked_at_and_not_touched(tmp_path: Path) -> None:
    make(tmp_path, json.dumps(flip_app()))
    custom = tmp_path / "app" / "custom"
    (custom / "sub").mkdir(parents=True)
    (custom / "flip" / "nvflare" / "components").mkdir(parents=True)
    own = f"from {FLIPS}.persist_and_cleanup import PersistToS3AndCleanup\n"
    (custom / "flip" / "nvflare" / "components" / "__init__.py").write_text(own)
    (custom / "sub" / "a.py").write_text("import os\nfrom flip.constants import FlipEvents, PTConstants\n")
    (custom / "b.py").write_text(f"from {FLIPS} import ServerEventHandler\n")
    (custom / "c.py").write_text(
        f"from {FLIPS} import (\n    PTModelLocator,  # x\n    PersistToS3AndCleanup as P,\n)\n"
    )
    (custom / "broken.py").write_bytes(b"def (:\xff")
    (custom / "link.py").symlink_to("/etc/passwd")
    os.mkfifo(custom / "pipe.py")
    before = snapshot(custom)
    said = notes(do(tmp_path))
    assert "custom/b.py uses FLIP's ServerEventHandler: import from" in said
    assert "custom/c.py uses FLIP's PersistToS3AndCleanup: import from" in said
    assert said.count("custom/") == 2  # nothing on FLIP's own files, nor on what works as it is
    assert f"stay FLIP's, and need FLIP's package as before: {FLIPS}.PTModelLocator" in said
    assert "no custom code" not in said
    assert snapshot(custom) == before


def test_a_job_without_code_needs_the_servers_consent(tmp_path: Path) -> None:
    make(tmp_path, json.dumps(flip_app()))
    assert "flip-obs install" in notes(adopt.plan(tmp_path))


def test_missing_parts_are_said(tmp_path: Path) -> None:
    app = flip_app()
    app["components"][2]["id"] = "other"
    make(tmp_path, json.dumps(app))
    assert "there is no component 'json_generator', which ServerEventHandler will ask for" in notes(do(tmp_path))


# -- other forms -----------------------------------------------------------------------------------------------------

HOCON = f"""\
# what FLIP runs
format_version = 2
model_id = "{MODEL_ID}"
components = [
  {{ id = persistor, path = "nvflare.app_common.np.np_model_persistor.NPModelPersistor", args {{}} }}
  # listens to [ everything }}
  {{
    id = flip_server_event_handler  // path = "{FLIPS}.ServerEventHandler"
    path = {FLIPS}.ServerEventHandler
    args {{ model_id = "" }}
  }}
  // "writes
  {{ id : json_generator, path : "{FLIPS}.ValidationJsonGenerator", args {{}} }},
  {{ id : "persist_and_cleanup", "path" : "{FLIPS}.PersistToS3AndCleanup", args {{ persistor_id = persistor }} }}
  # the end
]
workflows = [{{ id = fedavg, path = "nvflare.app_common.workflows.fedavg.FedAvg", args {{}} }}]
"""

YAML = f"""\
# what FLIP runs
format_version: 2
components:
  - id: persistor
    path: nvflare.app_common.np.np_model_persistor.NPModelPersistor
  # listens to everything
  - id: flip_server_event_handler  # path: {FLIPS}.ServerEventHandler
    path: "{FLIPS}.ServerEventHandler"
    args:
      model_id: ""
  # writes
  - id: json_generator
    path: '{FLIPS}.ValidationJsonGenerator'

  - id: persist_and_cleanup
    path: {FLIPS}.PersistToS3AndCleanup
    args: {{persistor_id: persistor}}
# and the work
workflows:
  - {{id: fedavg, path: nvflare.app_common.workflows.fedavg.FedAvg}}
"""
YAML_FLOW = yaml.safe_dump(flip_app(), default_flow_style=True, sort_keys=False, width=200)

FORMS = {
    "HOCON": ("config_fed_server.conf", HOCON),
    "HOCON with braces": ("config_fed_server.conf", "{\n" + HOCON + "}\n"),
    "HOCON that is JSON": ("config_fed_server.conf", json.dumps(flip_app(), indent=2)),
    "YAML": ("config_fed_server.yml", YAML),
    "YAML without an end": ("config_fed_server.yaml", YAML[: YAML.index("# and the work")].rstrip()),
    "YAML indented by nothing": ("config_fed_server.yml", yaml.safe_dump(flip_app(), sort_keys=False)),
    "YAML on few lines": ("config_fed_server.yml", YAML_FLOW),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("form", FORMS)
def test_the_other_forms_that_nvflare_reads(tmp_path: Path, form: str, newline: str) -> None:
    name, text = FORMS[form]
    text = text.replace("\n", newline)
    file = make(tmp_path, text, name)
    kind = ConfigFormat.PYHOCON if name.endswith("conf") else ConfigFormat.OMEGACONF
    data = config_text.parse(text, kind)
    before = snapshot(tmp_path)
    said = notes(do(tmp_path))
    after = file.read_bytes().decode()
    if form == "HOCON that is JSON":
        assert config_text.parse(after, kind) == adopted(data)
        assert sorted(after.replace(OURS, FLIPS)) == sorted(text)  # nothing but the names, and the order
    else:
        key = operator.itemgetter("id")
        wanted = {**adopted(data), "components": sorted(adopted(data)["components"], key=key)}
        found = config_text.parse(after, kind)
        assert {**found, "components": sorted(found["components"], key=key)} == wanted
        assert after.replace(OURS, FLIPS) == text
        assert "not the last component: move it there by hand" in said
    assert not do(tmp_path).edits
    undo(tmp_path)
    assert snapshot(tmp_path) == before


def test_nvflare_reads_the_adopted_hocon(tmp_path: Path) -> None:
    file = make(tmp_path, HOCON, "config_fed_server.conf")
    do(tmp_path)
    assert [item["path"].rsplit(".", 1)[1] for item in loaded(file)["components"]] == [
        "NPModelPersistor", "ServerEventHandler", "ValidationJsonGenerator", "PersistToS3AndCleanup",
    ]  # fmt: skip


def test_the_file_that_nvflare_would_take_is_the_one(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app()))
    shadowed = file.with_suffix(".conf")
    shadowed.write_text(HOCON)
    do(tmp_path)
    assert json.loads(file.read_text()) == adopted(flip_app())
    assert shadowed.read_text() == HOCON
    kept = editing.originals(file)
    assert len(kept) == 1
    assert loaded(file) == adopted(flip_app())  # and not the kept original beside it


# -- what is refused -------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], Any]) -> str:
    app = flip_app()
    change(app)
    return json.dumps(app, indent=2)


HANDLER = component("again", f"{FLIPS}.ServerEventHandler")
REFUSED = {
    "broken": ("json", '{"components": [', r"no valid JSON \(line 1\)"),
    "no object": ("json", "[]", "holds no object"),
    "a byte order mark": ("json", "\ufeff" + json.dumps(flip_app()), "byte order mark"),
    "a key twice": ("json", '{"components": [], "components": []}', "stands twice"),
    "comments in JSON": ("json", "// no\n" + json.dumps(flip_app()), "no valid JSON"),
    "an unknown class of FLIP's": (
        "json",
        changed(lambda app: app["components"].append(component("tell", f"{FLIPS}.x.HubTeller"))),
        "component 'tell' is of FLIP's class HubTeller, not known here",
    ),
    "two handlers": ("json", changed(lambda app: app["components"].append(HANDLER)), "2 components"),
    "a handler elsewhere": ("json", changed(lambda app: app["workflows"].append(HANDLER)), "not in its list"),
    "unknown arguments": (
        "json",
        changed(lambda app: app["components"][3]["args"].update(colour="red")),
        "component 'flip_server_event_handler' has arguments that our ServerEventHandler does not know: colour",
    ),
    "arguments that are none": (
        "json",
        changed(lambda app: app["components"][3].update(args=[1])),
        "component 'flip_server_event_handler' has arguments that are no object",
    ),
    "composed paths": (
        "json",
        json.dumps(flip_app()).replace(f"{FLIPS}.", "{flip}.").replace('"model_id": "0', f'"flip": "{FLIPS}", "m": "0'),
        "composes class paths of variables",
    ),
    "nested too deeply": ("json", "[" * 100_000, "nested too deeply"),
    "nested deeply": ("json", '{"a":' * 100 + "1" + "}" * 100, "nested too deeply"),
    "YAML nested too deeply": ("yml", "[" * 10_000, "no valid YAML|with the memory there is"),
    "HOCON nested too deeply": ("conf", "a=" + "[" * 10_000, "no valid HOCON|with the memory there is|longer than"),
    "too large": ("json", json.dumps(flip_app()) + " " * 1024 * 1024, "is larger than 1 MiB"),
    "includes": ("conf", 'include "other.conf"\n' + HOCON, "includes other files"),
    "included by URL": ("conf", 'include url("http://127.0.0.1:9/x")\n' + HOCON, "includes other files"),
    "a variable": ("conf", HOCON + "x = ${?HOME}\n", "refers to variables"),
    "put together": (
        "conf",
        HOCON.replace(f"path = {FLIPS}.ServerEventHandler", f'path = {FLIPS}.ServerEventHandler "x"'),
        "class ServerEventHandler x, not known here",
    ),
    "a text that looks like it": (
        "json",
        changed(lambda app: app.update(note=f"path: {FLIPS}.ServerEventHandler")),
        "cannot be changed without touching something else",
    ),
    "all of it spelled in another way": (
        "json",
        json.dumps(flip_app()).replace(FLIPS, f"\\u0066{FLIPS[1:]}"),
        "cannot be changed without touching something else",
    ),
    "spelled in another way": (
        "json",
        json.dumps(flip_app()).replace(f"{FLIPS}.Server", f"\\u0066{FLIPS[1:]}.Server"),
        "cannot be changed without touching something else",
    ),
    "named elsewhere": (
        "yml",
        YAML.replace(f'path: "{FLIPS}.ServerEventHandler"', "path: *it") + f"it: &it {FLIPS}.ServerEventHandler\n",
        "no valid YAML",
    ),
    "named before": (
        "yml",
        f"it: &it {FLIPS}.ServerEventHandler\n" + YAML.replace(f'path: "{FLIPS}.ServerEventHandler"', "path: *it"),
        "no valid YAML",
    ),
    "a string without an end": ("conf", 'components = ["x\n]', "not understood|has no end"),
    "anchors": (
        "yml",
        YAML.replace("- id: flip_server", "- &h\n    id: flip_server").replace("workflows:", "x: *h\nworkflows:"),
        "no valid YAML",
    ),
    "broken YAML": ("yml", "a: [", r"no valid YAML \(line"),
    "objects in YAML": ("yml", "a: !!python/object/apply:os.system ['true']", "no valid YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_nothing_changed(tmp_path: Path, case: str) -> None:
    suffix, text, reason = REFUSED[case]
    file = make(tmp_path, text, f"config_fed_server.{suffix}")
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match=reason) as caught:
        do(tmp_path)
    assert str(file) in str(caught.value)
    assert snapshot(tmp_path) == before


def test_one_app_that_is_refused_leaves_all_as_they_are(tmp_path: Path) -> None:
    make(tmp_path, json.dumps(flip_app()), app="a")
    make(tmp_path, "{", app="b")
    before = snapshot(tmp_path)
    with pytest.raises(EditError):
        do(tmp_path)
    assert snapshot(tmp_path) == before


def test_what_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="is not there"):
        adopt.plan(tmp_path / "nowhere")
    with pytest.raises(EditError, match="is no NVFLARE job"):
        adopt.plan(tmp_path)
    (tmp_path / "job.zip").touch()
    with pytest.raises(EditError, match="unpack the job first"):
        adopt.plan(tmp_path / "job.zip")


def test_links_out_of_the_job_are_not_followed(tmp_path: Path) -> None:
    shared = make(tmp_path / "shared", json.dumps(flip_app()))
    job = tmp_path / "job"
    (job / "app" / "config").mkdir(parents=True)
    link = job / "app" / "config" / "config_fed_server.json"
    link.symlink_to(shared)
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match="outside of"):
        do(job)
    link.unlink()
    (job / "app" / "config").rmdir()
    (job / "app").rmdir()
    (job / "app").symlink_to(tmp_path / "shared" / "app")
    with pytest.raises(EditError, match="outside of"):
        do(job)
    assert snapshot(tmp_path / "shared") == {
        name.removeprefix("shared/") if name != "shared" else ".": entry
        for name, entry in before.items()
        if name == "shared" or name.startswith("shared/")
    }


def test_links_inside_of_the_job_are_kept_and_one_file_is_changed_once(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app()), app="a")
    twin = tmp_path / "b" / "config"
    twin.mkdir(parents=True)
    (twin / "config_fed_server.json").symlink_to("../../a/config/config_fed_server.json")
    before = snapshot(tmp_path)
    assert len(do(tmp_path).edits) == 1
    assert (twin / "config_fed_server.json").is_symlink()
    assert json.loads(file.read_text()) == adopted(flip_app())
    undo(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_job_reached_by_a_link(tmp_path: Path) -> None:
    file = make(tmp_path / "job", json.dumps(flip_app()))
    (tmp_path / "link").symlink_to("job")
    do(tmp_path / "link")
    assert json.loads(file.read_text()) == adopted(flip_app())


# -- jobs without FLIP -----------------------------------------------------------------------------------------------


def plain(*listed: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": 2, "components": list(listed), "workflows": [FEDAVG]}


def test_a_plain_job_is_refused_unless_components_are_to_be_added(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(plain(PERSISTOR), indent=2))
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match=r"no components of FLIP's: nothing to adopt\. --add puts"):
        do(tmp_path)
    assert snapshot(tmp_path) == before
    assert "added: json_generator, persist_and_cleanup, flip_server_event_handler" in notes(do(tmp_path, add=True))
    listed = json.loads(file.read_text())["components"]
    assert listed[0] == PERSISTOR
    assert [item["path"].rsplit(".", 1)[1] for item in listed[1:]] == [
        "ValidationJsonGenerator", "PersistToS3AndCleanup", "ServerEventHandler",
    ]  # fmt: skip
    assert '\n    },\n    {\n      "id": "json_generator"' in file.read_text()
    assert not do(tmp_path, add=True).edits
    undo(tmp_path)
    assert snapshot(tmp_path) == before


def test_another_persistor_is_named(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(plain({**PERSISTOR, "id": "mine"}), indent="\t").replace("\n", "\r\n"))
    do(tmp_path, add=True, persistor_id="mine")
    assert json.loads(file.read_text())["components"][2]["args"] == {"persistor_id": "mine"}
    assert b'\r\n\t\t\t"id": "json_generator",\r\n' in file.read_bytes()


def test_nvflares_own_generator_is_used(tmp_path: Path) -> None:
    own = component("json_generator", "nvflare.app_common.widgets.validation_json_generator.ValidationJsonGenerator")
    file = make(tmp_path, json.dumps(plain(PERSISTOR, own)))
    do(tmp_path, add=True)
    listed = json.loads(file.read_text())["components"]
    assert [item["id"] for item in listed][1:] == ["json_generator", "persist_and_cleanup", "flip_server_event_handler"]


ADD_REFUSED = {
    "no persistor": (json.dumps(plain({**PERSISTOR, "id": "mine"})), "no component 'persistor'.*components: mine"),
    "no components": (json.dumps({"workflows": [FEDAVG]}), r"components: none"),
    "an id is taken": (
        json.dumps(plain(PERSISTOR, component("persist_and_cleanup", "a.B"))),
        "ids that ours need: persist_and_cleanup",
    ),
    "components that are no list": ('{"components": {}}', "components is no list"),
}


@pytest.mark.parametrize("case", ADD_REFUSED)
def test_what_cannot_be_added_to(tmp_path: Path, case: str) -> None:
    text, reason = ADD_REFUSED[case]
    make(tmp_path, text)
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match=reason):
        do(tmp_path, add=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("suffix", ["yml", "conf"])
def test_nothing_is_added_to_other_forms(tmp_path: Path, suffix: str) -> None:
    make(tmp_path, json.dumps(plain(PERSISTOR)), f"config_fed_server.{suffix}")
    with pytest.raises(EditError, match="into this file by hand"):
        do(tmp_path, add=True)


# -- jobs of a stranger's ----------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address that remembers what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"fetched = 1\n")

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("word", ["include", "Include", "INCLUDE", "\u0131nclude"])
def test_no_file_and_no_address_is_read_for_a_job(
    tmp_path: Path, word: str, listener: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "a-very-secret-key")
    secret = tmp_path / "server.key"
    secret.write_text("password = a-very-secret-key\n")
    address, asked = listener
    for reference in (f'"{secret}"', f'file("{secret}")', f'url("{address}/x")', f'required(file("{secret}"))'):
        job = tmp_path / str(len(list(tmp_path.iterdir())))
        make(job, f"{HOCON}\nx {{\n{word} {reference}\n}}\n", "config_fed_server.conf")
        shown = flip_obs("adopt", job, "--check")
        assert "a-very-secret-key" not in shown.stdout + shown.stderr
        assert (shown.returncode, "includes other files" in " ".join(shown.stderr.split())) == (1, True)
    assert asked == []


@pytest.mark.parametrize("suffix", ["conf", "yml"])
def test_no_variable_is_looked_up_for_a_job(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "a-very-secret-key")
    reference = {
        "conf": HOCON.replace(f"path = {FLIPS}.Server", "path = ${?INTERNAL_SERVICE_KEY}.Server"),
        "yml": YAML.replace('model_id: ""', 'model_id: "${oc.env:INTERNAL_SERVICE_KEY}"'),
    }
    make(tmp_path, reference[suffix], f"config_fed_server.{suffix}")
    shown = flip_obs("adopt", tmp_path, "--check")
    assert shown.returncode == 1
    assert "a-very-secret-key" not in shown.stdout + shown.stderr


def test_the_reader_itself_opens_nothing_and_knows_no_environment(
    tmp_path: Path, listener: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the search for words would overlook stays outside by the process's own limits."""
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "a-very-secret-key")
    secret = tmp_path / "server.key"
    secret.write_text("password = a-very-secret-key\n")
    address, asked = listener
    text = f'include "{secret}"\ninclude url("{address}/x")\nkey = ${{?INTERNAL_SERVICE_KEY}}\nmine = 1\n'
    assert config_text._read_elsewhere(text, ConfigFormat.PYHOCON) == {"mine": 1}
    assert asked == []


BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijkl"))


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    make(tmp_path, BOMB + YAML, "config_fed_server.yml")
    with pytest.raises(EditError, match="no valid YAML"):
        do(tmp_path)


def test_what_takes_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_text, "DEADLINE_SECONDS", 1.0)
    make(tmp_path, HOCON + "x = [" + "{a:1}\n" * 100_000 + "]\n", "config_fed_server.conf")
    with pytest.raises(EditError, match="takes longer than 1 s to read"):
        do(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "socket"])
def test_what_is_no_file_is_refused_and_holds_nobody_up(tmp_path: Path, kind: str) -> None:
    file = make(tmp_path, "")
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        os.mknod(file, 0o600 | stat.S_IFSOCK)
    else:
        file.symlink_to({"device": "/dev/zero", "loop": file.name}[kind])
    with pytest.raises(EditError, match=r"regular file|outside of|leads nowhere"):
        do(tmp_path)
    with pytest.raises(EditError, match=r"regular file|outside of|leads nowhere"):
        undo(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_planted_original_that_is_no_file_is_not_taken(tmp_path: Path, kind: str) -> None:
    file = make(tmp_path / "job", json.dumps(adopted(flip_app()), indent=2))
    secret = tmp_path / "server.key"
    secret.write_text("a-very-secret-key")
    planted = editing.backup_name(file, file.read_bytes())
    if kind == "link":
        planted.symlink_to(secret)
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir}[kind](planted)
    shown = flip_obs("adopt", tmp_path / "job", "--undo", "--yes")
    assert shown.returncode == 0
    assert "a-very-secret-key" not in shown.stdout + shown.stderr
    assert not file.is_symlink()
    assert {item["path"] for item in json.loads(file.read_text())["components"]} == {
        item["path"] for item in flip_app()["components"]
    }
    assert secret.read_text() == "a-very-secret-key"


def test_one_original_is_kept_and_a_planted_one_is_replaced(tmp_path: Path) -> None:
    file = make(tmp_path / "job", json.dumps(flip_app(), indent=2))
    before = file.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (edit,) = adopt.plan(tmp_path / "job").edits
    edit.kept_in.symlink_to(elsewhere)
    file.with_name(file.name + editing.BACKUP + "0" * 16).write_text("{}")
    do(tmp_path / "job")
    (kept,) = editing.originals(file)
    assert (kept.read_bytes(), kept.is_symlink()) == (before, False)
    assert elsewhere.read_text() == "mine"


# -- undoing ---------------------------------------------------------------------------------------------------------


def test_an_edit_since_survives_the_undo(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app(), indent=2))
    do(tmp_path)
    file.write_text(file.read_text().replace('"num_rounds": 3', '"num_rounds": 33'))
    assert "edited since" in notes(undo(tmp_path))
    content = json.loads(file.read_text())
    assert content["workflows"][1]["args"]["num_rounds"] == 33
    assert {item["path"] for item in content["components"]} == {item["path"] for item in flip_app()["components"]}
    assert not editing.originals(file)


def test_a_job_whose_original_got_lost(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app(), indent=2))
    do(tmp_path)
    for kept in editing.originals(file):
        kept.unlink()
    assert "no original beside it" in notes(undo(tmp_path))
    content = json.loads(file.read_text())
    assert {item["path"] for item in content["components"]} == {item["path"] for item in flip_app()["components"]}


def test_what_cannot_be_changed_back_is_said(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(adopted(flip_app())).replace(OURS, f"\\u0066{OURS[1:]}"))
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match="is not changed back") as caught:
        undo(tmp_path)
    assert str(file) in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_job_made_anew_is_adopted_anew(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app(), indent=2))
    do(tmp_path)
    file.write_text(json.dumps(flip_app("EvaluationJsonGenerator"), indent=1))
    before = file.read_bytes()
    do(tmp_path)
    assert len(editing.originals(file)) == 1
    undo(tmp_path)
    assert file.read_bytes() == before


def test_a_change_while_it_is_asked_about_is_not_overwritten(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app(), indent=2))
    wanted = adopt.plan(tmp_path)
    file.write_text(json.dumps(flip_app(), indent=3))
    before = snapshot(tmp_path)
    with pytest.raises(EditError, match="changed by somebody else"):
        wanted.apply()
    assert snapshot(tmp_path) == before


def test_several_at_once_are_as_one(tmp_path: Path) -> None:
    file = make(tmp_path, json.dumps(flip_app(), indent=2))
    before = snapshot(tmp_path)
    failures: list[BaseException] = []

    def one() -> None:
        try:
            do(tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert json.loads(file.read_text()) == adopted(flip_app())
    undo(tmp_path)
    assert snapshot(tmp_path) == before


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_asks_and_changes(tmp_path: Path) -> None:
    app = flip_app()
    app["components"][2]["args"] = {"results_dir": "\x9b31m\u202eevil"}
    make(tmp_path, json.dumps(app, indent=2, ensure_ascii=False))
    before = snapshot(tmp_path)
    check = flip_obs("adopt", tmp_path, "--check")
    assert check.returncode == 1
    assert f'-      "path": "{FLIPS}.ValidationJsonGenerator",' in check.stdout
    assert f'+      "path": "{OURS}.ValidationJsonGenerator",' in check.stdout
    assert "\\x9b31m\\u202eevil" in check.stdout
    assert flip_obs("adopt", tmp_path, answer="n\n").returncode == 1
    assert snapshot(tmp_path) == before
    asked = flip_obs("adopt", tmp_path, answer="y\n")
    assert (asked.returncode, asked.stderr) == (0, "")
    again = flip_obs("adopt", tmp_path, "--check")
    assert again.returncode == 0
    assert "Adopted already; nothing to change." in again.stdout
    assert flip_obs("adopt", tmp_path, "--undo", "--check").returncode == 1
    assert flip_obs("adopt", tmp_path, "--undo", "--yes").returncode == 0
    assert snapshot(tmp_path) == before
    assert "Nothing to undo." in flip_obs("adopt", tmp_path, "--undo").stdout
    refused = flip_obs("adopt", tmp_path / "app" / "config")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is no NVFLARE job" in refused.stderr
    assert flip_obs("adopt", tmp_path, "--undo", "--add").returncode == 2


# -- NVFLARE makes the components ------------------------------------------------------------------------------------


def test_nvflare_builds_an_adopted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's job with FLIP's names instead of ours, adopted, and configured as a job's process does it."""
    monkeypatch.setenv("LOCAL_DEV", "true")
    job = demo_job.write_job(tmp_path / "job", MODEL_ID, SCENARIOS["success"])
    file = job / "app" / "config" / "config_fed_server.json"
    ours = file.read_bytes()
    file.write_bytes(ours.replace(OURS.encode(), FLIPS.encode()))
    do(job)
    assert file.read_bytes() == ours
    for folder in ("startup", "local"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    args = Namespace(workspace=str(tmp_path / "root"), job_id="a-job", set=[])
    configurator = ServerJsonConfigurator(Workspace(args.workspace, "server"), str(file), args, str(job / "app"))
    configurator.configure()
    built = configurator.runner_config.components
    assert isinstance(built["persist_and_cleanup"], components.PersistToS3AndCleanup)
    assert isinstance(built["json_generator"], components.ValidationJsonGenerator)
    last = [handler for handler in configurator.runner_config.handlers if isinstance(handler, FLComponent)]
    assert isinstance(built["flip_server_event_handler"], components.ServerEventHandler)
    order = [type(handler).__name__ for handler in last]
    assert order.index("ServerEventHandler") > order.index("PersistToS3AndCleanup")


# -- any spelling ----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    others=st.dictionaries(TEXTS.filter(lambda key: key != "components"), VALUES, max_size=3),
    args=st.dictionaries(TEXTS, VALUES, max_size=3),
    order=st.permutations(range(5)),
    indent=st.sampled_from([None, 0, 1, 2, 4, "\t"]),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    seed=st.integers(0, 2**16),
)
@example(
    others={}, args={"path": [], "class_path": {}}, order=[*range(5)], indent=2, ascii_only=True, newline="\n", seed=0
)
def test_any_json_is_adopted_and_restored(
    tmp_path_factory: pytest.TempPathFactory,
    others: dict[str, Any],
    args: dict[str, Any],
    order: list[int],
    indent: Any,
    ascii_only: bool,
    newline: str,
    seed: int,
) -> None:
    app = flip_app()
    app["components"][0]["args"] = args
    app["components"] = [app["components"][index] for index in order]
    app = {**others, **app}
    keys = list(app)
    random.Random(seed).shuffle(keys)
    app = {key: app[key] for key in keys}
    folder = tmp_path_factory.mktemp("job")
    file = make(folder, json.dumps(app, indent=indent, ensure_ascii=ascii_only).replace("\n", newline))
    before = snapshot(folder)
    do(folder)
    after = json.loads(file.read_bytes())
    assert config_text.same(after, adopted(app))
    undo(folder)
    assert snapshot(folder) == before
    for path in sorted(folder.rglob("*"), reverse=True):
        os.unlink(path) if path.is_file() else path.rmdir()
