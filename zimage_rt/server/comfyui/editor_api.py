"""What ComfyUI's editor asks beside the protocol: settings, a user's files, templates, and what there is none of.

These routes are there without the editor, too, for clients that ask them. Without it there are no templates.
"""

from __future__ import annotations

import asyncio
import mimetypes
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...errors import RequestError
from ..access import Caller
from ..bounds import MAX_DEPTH, MAX_STRUCTURE, parse_whole_json
from ..errors import NotFound
from ..jobs_api import CallerOf
from .prompt_api import WorkflowsOf
from .templates import Templates
from .user_data import UserData, file_info
from .workflows import Workflows

router = APIRouter(include_in_schema=False)

# Media types that a browser would run; such files are sent as bytes.
ACTIVE = ("text/html", "text/xml", "application/xml", "application/xhtml+xml", "image/svg+xml", "text/css")
ACTIVE_ENDINGS = ("javascript", "ecmascript", "xml")
# The user's own style sheet, which the editor's page asks for.
STYLE = "user.css"
LOGS = "The service writes its log to standard error; it has the requests of all users.\n"


def user_data(workflows: Workflows, who: Caller) -> UserData:
    """The editor's files of a caller."""
    return workflows.folder(who.name).user


# --- settings -------------------------------------------------------------------------------------------------------


@router.get("/users")
async def users(who: CallerOf) -> dict[str, Any]:
    """That the server keeps the settings. Who a user is, the key says."""
    return {"storage": "server", "migrated": True}


@router.get("/settings")
async def settings(workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """All settings that the user has changed."""
    return await user_data(workflows, who).settings()


@router.get("/settings/{name}")
async def setting(name: str, workflows: WorkflowsOf, who: CallerOf) -> JSONResponse:
    """A setting; null if the user has not changed it."""
    return JSONResponse((await user_data(workflows, who).settings()).get(name))


def _whole(body: bytes) -> Any:
    return parse_whole_json(body, MAX_STRUCTURE, MAX_DEPTH)


@router.post("/settings")
async def change_settings(request: Request, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """Change some settings."""
    settings = _whole(await request.body())
    if not isinstance(settings, dict):
        raise RequestError("body: expected an object of settings")
    await user_data(workflows, who).change_settings(settings)
    return Response()


@router.post("/settings/{name}")
async def change_setting(name: str, request: Request, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """Change a setting."""
    await user_data(workflows, who).change_settings({name: _whole(await request.body())})
    return Response()


# --- files ----------------------------------------------------------------------------------------------------------


@router.get("/userdata")
async def list_files(
    workflows: WorkflowsOf,
    who: CallerOf,
    dir: str = "",
    recurse: str = "",
    full_info: str = "",
    split: str = "",
) -> list[Any]:
    """The files of a folder: their paths, as parts with `split`, or with sizes and times with `full_info`."""
    if not dir:
        raise RequestError("dir: expected the name of a folder, got none", field="dir")
    folder, files = await user_data(workflows, who).listed(dir, recurse=_is_true(recurse))
    if _is_true(full_info):
        return [file_info(path, folder) for path in files]
    paths = [path.relative_to(folder).as_posix() for path in files]
    return [[path, *path.split("/")] for path in paths] if _is_true(split) else paths


@router.get("/v2/userdata")
async def list_entries(workflows: WorkflowsOf, who: CallerOf, path: str = "") -> list[dict[str, Any]]:
    """All folders and files below a folder."""
    return await user_data(workflows, who).entries(path)


@router.get("/userdata/{name:path}")
async def file(name: str, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """A file, to be saved and not to be shown: nothing that a user keeps runs in a browser."""
    content = await user_data(workflows, who).read(name)
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    is_active = kind in ACTIVE or kind.endswith(ACTIVE_ENDINGS)
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-cache"}
    if name == STYLE:
        return Response(content, media_type="text/css", headers={**headers, "Content-Disposition": "inline"})
    kind = "application/octet-stream" if is_active else kind
    return Response(content, media_type=kind, headers={**headers, "Content-Disposition": "attachment"})


@router.post("/userdata/{rest:path}")
async def change_file(
    rest: str,
    request: Request,
    workflows: WorkflowsOf,
    who: CallerOf,
    overwrite: str = "true",
    full_info: str = "",
) -> JSONResponse:
    """Write a file; or rename it, with `/move/` and the new name after its own."""
    data = user_data(workflows, who)
    name, target = names_of(request)
    if target is None:
        path = await data.write(name, await request.body(), overwrite=overwrite.lower() != "false")
    else:
        path = await data.move(name, target, overwrite=overwrite.lower() != "false")
    found = file_info(path, data.root)
    return JSONResponse(found if _is_true(full_info) else found["path"])


@router.delete("/userdata/{name:path}")
async def remove_file(name: str, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """Remove a file."""
    await user_data(workflows, who).remove(name)
    return Response(status_code=204)


def names_of(request: Request) -> tuple[str, str | None]:
    """The file of a request, and its new name if it is to be renamed.

    Slashes within a name are sent as `%2F`, so that a folder may be named `move`.
    """
    sent = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
    first, *others = sent.partition("/userdata/")[2].split("/")
    if len(others) >= 2 and others[0] == "move":
        return unquote(first), unquote("/".join(others[1:]))
    return unquote("/".join([first, *others])), None


def _is_true(text: str) -> bool:
    return text.lower() == "true"


# --- templates ------------------------------------------------------------------------------------------------------


@router.get("/templates/{name:path}")
async def template(name: str, request: Request, who: CallerOf) -> Response:
    """A template, or a list of those that run here."""
    templates: Templates | None = request.app.state.templates
    content = None if templates is None else templates.file(name)
    if content is None:
        raise NotFound(f"templates: there is no {name[-64:]!r}")
    return Response(content, media_type="application/json", headers={"Cache-Control": "private, no-cache"})


@router.get("/workflow_templates")
async def custom_templates(who: CallerOf) -> dict[str, Any]:
    """None: these are those of custom nodes."""
    return {}


# --- what there is none of ------------------------------------------------------------------------------------------


@router.get("/i18n")
async def translations(who: CallerOf) -> dict[str, Any]:
    """None: these are those of custom nodes; the editor has its own."""
    return {}


@router.get("/global_subgraphs")
async def subgraphs(who: CallerOf) -> dict[str, Any]:
    """None; a user's own are files of theirs."""
    return {}


@router.get("/node_replacements")
async def replacements(who: CallerOf) -> dict[str, Any]:
    """None: no node here replaces another."""
    return {}


@router.get("/internal/logs")
async def logs(who: CallerOf) -> JSONResponse:
    """Where the log is: no user may read what the others asked for."""
    return JSONResponse(LOGS)


@router.get("/internal/logs/raw")
async def raw_logs(who: CallerOf) -> dict[str, Any]:
    """The same as the editor's terminal shows it."""
    return {"entries": [{"t": "", "m": LOGS}], "size": {"cols": 80, "rows": 24}}


@router.patch("/internal/logs/subscribe")
async def follow_logs(who: CallerOf) -> Response:
    """Nothing follows."""
    return Response()


@router.get("/internal/folder_paths")
async def folder_paths(who: CallerOf) -> dict[str, Any]:
    """None: where the service has its files is its own business."""
    return {}


@router.get("/internal/files/{kind}")
async def files(kind: str, workflows: WorkflowsOf, who: CallerOf) -> list[str]:
    """The images of `input`, `output` or `temp`, the newest first, as the editor's library lists them."""
    folder = workflows.folder(who.name).folder(kind)
    return await asyncio.to_thread(newest_first, folder)


def newest_first(folder: Path) -> list[str]:
    """The names of a folder's files that are not hidden."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
