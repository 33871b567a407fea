"""The HTTP application: protocols, errors, guards, and the life of the service behind them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from .._version import __version__
from ..errors import ZImageError
from . import batches_api, jobs_api, openai_api, page, sessions_api
from .access import KeyGuard
from .comfyui import catalogue_api, editor_api, files_api, prompt_api
from .comfyui.editor import EditorFiles, editor_router
from .comfyui.templates import Templates
from .comfyui.workflows import Workflows
from .config import ServiceConfig
from .errors import answer, answer_to, error_body
from .guard import BodyGuard, HostGuard
from .logs import AccessLog, log_job
from .metrics import Metrics
from .openapi import ERRORS
from .pool import MakeWorkers, worker_processes
from .service import Service
from .worker import error_json

log = logging.getLogger(__name__)

DESCRIPTION = """
Draws images with Z-Image models. `POST /v1/jobs` takes every field of a request, and its events tell the progress;
`/v1/images` speaks OpenAI's protocol.
"""


def create_app(config: ServiceConfig, make_workers: MakeWorkers = worker_processes) -> FastAPI:
    """The application of a service, which starts and stops with it. Raises ConfigError."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service: Service = app.state.service
        await service.start()
        await sessions_api.resume(service)
        await batches_api.resume(service)
        await app.state.workflows.start()
        yield
        await service.drain()
        await app.state.workflows.stop()  # which still writes to the record
        await service.stop()

    app = FastAPI(
        title="zimage_rt",
        version=__version__,
        description=DESCRIPTION,
        lifespan=life,
        responses=dict(ERRORS),
    )
    app.state.service = service = Service(config, make_workers)
    app.state.metrics = metrics = Metrics(service)
    service.on_end += [metrics.job_ended, log_job]
    app.state.workflows = Workflows(service)
    editor = EditorFiles() if config.comfyui.editor else None
    app.state.templates = None if editor is None else Templates(app.state.workflows.files)
    # The last one comes first: what is refused is logged, and a page that may call can read why it has no key.
    app.add_middleware(BodyGuard, max_bytes=config.limits.max_body_bytes)
    app.add_middleware(KeyGuard, service=service)
    if config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Zimage-Job"],
        )
    app.add_middleware(HostGuard, config=config)
    app.add_middleware(AccessLog, on_answer=metrics.answered)
    app.add_exception_handler(ZImageError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)
    app.include_router(jobs_api.router)
    app.include_router(openai_api.router)
    app.include_router(sessions_api.router)
    app.include_router(batches_api.router)
    app.include_router(page.router)
    app.include_router(page.home if editor is None else editor_router(editor))
    for prefix in ("", "/api"):  # each route of ComfyUI's is at both
        for router in (prompt_api.router, files_api.router, catalogue_api.router, editor_api.router):
            app.include_router(router, prefix=prefix)
    app.add_api_route("/healthz", healthz, tags=["health"])
    app.add_api_route("/readyz", readyz, tags=["health"])
    app.add_api_route("/metrics", metrics_text, response_class=PlainTextResponse, include_in_schema=False)
    return app


async def healthz() -> dict[str, str]:
    """Whether the service lives."""
    return {"status": "ok"}


async def readyz(request: Request) -> JSONResponse:
    """Whether a worker takes jobs: 200, or 503 while models are loaded, or after the service began to end."""
    service: Service = request.app.state.service
    problems = {model: text for worker in service.workers for model, text in worker.problems.items()}
    body = {
        "ready": service.is_ready,
        "workers": [
            {"device": worker.device, "ready": worker.is_ready, "models": list(worker.models)}
            for worker in service.workers
        ],
        "problems": problems,
    }
    return JSONResponse(body, 200 if service.is_ready else 503)


async def metrics_text(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of the service's: the client learns that, and the log has the rest."""
    return answer(error_json(error))


async def _left(request: Request, error: Exception) -> Response:
    """The client went away before its body was here: nobody reads this, and it is no fault of the service's."""
    return Response(status_code=400)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ZImageError)
    return answer_to(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is not what the protocol says: the first fault, by its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    field = ".".join(place) or None
    return JSONResponse(error_body("invalid_request", f"{field or 'body'}: {first['msg']}", field), 400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    code = codes.get(error.status_code, "invalid_request")
    body = error_body(code, f"{request.method} {request.url.path}: {error.detail}")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        # The router names the methods of one route alone, and a path has a route per method.
        described = request.app.openapi()["paths"].items()
        found = [each for template, each in described if compile_path(template)[0].match(request.url.path)]
        if found:
            headers["Allow"] = ", ".join(sorted({method.upper() for each in found for method in each}))
    return JSONResponse(body, error.status_code, headers=headers)
