"""`/v1/batches`: tables over HTTP, beside single requests, and over a restart of the service."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server

import zimage_rt
from zimage_rt.batch.rows import row_seed
from zimage_rt.cli.main import app

TABLE = "animal,seed,height\npanda,7,\ncat,,96\ndog,-1,\n"


def send(server: Server, table: str, name: str = "goods.csv", **fields: str) -> Any:
    return server.client.post("/v1/batches", data=fields, files={"table": (name, table.encode())})


def wait(server: Server, batch: str, seconds: float = 60) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = server.client.get(f"/v1/batches/{batch}").json()
        if status["state"] != "running":
            return status
        time.sleep(0.05)
    raise AssertionError(status)


def key_of(server_folder: Path, name: str, *limits: str) -> str:
    result = CliRunner().invoke(app, ["keys", "add", name, "--data", str(server_folder / "data"), *limits])
    return f"Bearer {result.stdout.strip()}"


def pixels(server: Server, job: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.client.get(f"/v1/jobs/{job}/images/0").content)))


def test_rows_are_drawn_as_the_command_draws_them(bundle: Path, tmp_path: Path, engine: zimage_rt.Engine) -> None:
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        small_form = {"num_inference_steps": "1", "width": "64", "height": "64"}
        answer = send(server, TABLE, batch_seed="5", template="a {animal}", **small_form)
        assert answer.status_code == 202, answer.text
        assert answer.json()["warnings"] == []
        status = wait(server, answer.json()["id"])
        assert (status["rows"], status["done"], status["failed"]) == (3, 2, 1)
        first, second, third = status["jobs"]
        small = {"width": 64, "num_inference_steps": 1}
        assert pixels(server, first["id"]).tobytes() == (
            engine.generate("a panda", height=64, seed=7, **small).images[0].tobytes()
        )
        assert pixels(server, second["id"]).tobytes() == (
            engine.generate("a cat", height=96, seed=row_seed(5, 2), **small).images[0].tobytes()
        )
        assert third["state"] == "failed" and third["error"]["field"] == "seed"
        for table, name, message in (
            ("prompt,stepz\na,1\n", "a.csv", "stepz"),
            ("prompt,Size\na,64x64\n", "a.csv", "column 'Size': say it in the columns width and height"),
            ("prompt,n\na,2\n", "a.csv", "call it num_images"),
            ("prompt,quality\na,high\n", "a.csv", "call it num_inference_steps"),
            ("prompt,output_format\na,jpeg\n", "a.csv", "as a field of the form"),
            ('{"prompt": "a"}\n{"prompt": "a", "model": "nano"}\n', "a.jsonl", "column 'model'"),
            ("", "a.csv", "got no rows"),
            ("prompt\na\n", "a.exe", "expected a file name that ends in"),
        ):
            refused = send(server, table, name)
            assert refused.status_code == 400 and message in refused.json()["error"]["message"], refused.text
            assert str(tmp_path) not in refused.text
        for fields, param, message in (
            ({"seed": "1", "batch_seed": "1"}, "seed", "batch_seed, which is the same"),
            ({"seed": "-1"}, "seed", "whole number"),
            ({"seed[]": "1"}, "seed", "a column `seed`"),
            ({"priority": "5"}, "priority", "leave it out"),
            ({"output_quality": "90"}, "output_quality", "a PNG keeps every pixel"),
            ({"template": "a {prompt}", "prompt": "b"}, "prompt", "the template takes its place"),
        ):
            refused = send(server, "prompt\na\n", "a.csv", **fields)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
            assert message in refused.json()["error"]["message"]
        # Every way to write a form's field reaches the rows, and `seed` is that of `zimage batch`.
        fields = {
            **small_form,
            "num_inference_steps": "4",
            "num_images_per_prompt": "2",
            "second_pass[scale]": "1.0",
            "seed": "5",
        }
        answer = send(server, "prompt,sku,note\na cat,1,\n", "a.csv", **fields)
        assert answer.json()["warnings"] == ["no request fields, and ignored: sku"]
        status = wait(server, answer.json()["id"])
        (job,) = status["jobs"]
        assert status["warnings"] == answer.json()["warnings"]
        expected = engine.generate(
            "a cat",
            height=64,
            seed=row_seed(5, 1),
            num_images=2,
            second_pass=zimage_rt.SecondPass(scale=1.0),
            **{**small, "num_inference_steps": 4},
        )
        assert pixels(server, job["id"]).tobytes() == expected.images[0].tobytes()
        assert server.client.get(f"/v1/jobs/{job['id']}").json()["images"] == 2
        secret = tmp_path / "secret.png"
        Image.new("RGB", (64, 64)).save(secret)
        for field in ("image", "mask", "control_image"):
            refused = send(server, "prompt\na\n", "a.csv", **{field: str(secret)})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == field, refused.text
            refused = server.client.post(
                "/v1/batches", files={"table": ("a.csv", b"prompt\na\n"), field: ("a.png", secret.read_bytes())}
            )
            assert refused.status_code == 400 and "rows have no images" in refused.json()["error"]["message"]
        answer = send(server, "prompt,image\na,/etc/passwd\n", "a.csv")
        (job,) = wait(server, answer.json()["id"])["jobs"]
        assert job["state"] == "failed" and "cannot name files" in job["error"]["message"]
        listed = server.client.get("/v1/batches").json()["batches"]
        assert len(listed) == 3 and server.client.get("/v1/batches/none").status_code == 404
    finally:
        assert server.stop() == 0


def test_a_batch_goes_on_after_a_restart_and_lets_others_pass(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    rows = "".join(f'{{"prompt": "a panda", "seed": {seed}}}\n' for seed in range(30))
    try:
        server.wait_until_ready()
        fields = {"num_inference_steps": "6", "width": "128", "height": "128"}
        batch = send(server, rows, "rows.jsonl", **fields).json()["id"]
        single = server.draw(prompt="a cat", height=64, width=64, num_inference_steps=1)
        status = server.client.get(f"/v1/batches/{batch}").json()
        assert single["state"] == "done" and status["done"] < 20  # it did not wait for the batch
    finally:
        server.process.kill()
        server.process.wait()
    again = Server(tmp_path, bundle=bundle)
    try:
        status = wait(again, batch)
        assert (status["done"], status["rows"]) == (30, 30)
        assert [job["row"] for job in status["jobs"]] == list(range(1, 31))
        other = send(again, rows, "rows.jsonl", **fields).json()["id"]
        assert again.client.delete(f"/v1/batches/{other}").json()["state"] == "cancelled"
        time.sleep(1)
        assert again.client.get(f"/v1/batches/{other}").json()["done"] < 30
    finally:
        assert again.stop() == 0


def test_rows_that_a_key_may_never_ask_for_fail_and_the_others_are_drawn(bundle: Path, tmp_path: Path) -> None:
    limits = ("--max-pixels", "4096", "--max-steps", "4")
    dora = key_of(tmp_path, "dora", *limits)
    slow = key_of(tmp_path, "slow", "--megapixel-steps-per-minute", "1", "--max-jobs", "1")
    reader = key_of(tmp_path, "reader", "--max-jobs", "0")
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        server.client.headers["Authorization"] = dora
        table = "prompt,steps,width,height\na,1,64,64\nb,8,64,64\nc,1,256,256\nd,2,64,64\n"
        status = wait(server, send(server, table).json()["id"])
        assert [job["state"] for job in status["jobs"]] == ["done", "failed", "failed", "done"]
        _, steps, size, _ = (job["error"] for job in status["jobs"])
        assert steps["code"] == size["code"] == "forbidden"
        assert "may ask for 4 (max_steps), got 8" in steps["message"]
        assert "may draw 4096 pixels (max_pixels), got 256x256" in size["message"]

        server.client.headers["Authorization"] = slow
        # More jobs than the key may have at once are no reason to fail.
        rows = "prompt,steps,width,height\na,20,256,256\nb,1,64,64\nc,1,64,64\n"
        status = wait(server, send(server, rows).json()["id"])
        assert [job["state"] for job in status["jobs"]] == ["failed", "done", "done"]
        assert "this request alone has 1.31" in status["jobs"][0]["error"]["message"]

        server.client.headers["Authorization"] = reader
        posts = [send(server, table), *(server.client.post(f"/v1/{name}", json={}) for name in ("sessions", "jobs"))]
        for answer in posts:
            assert answer.status_code == 403 and "max_jobs is 0" in answer.json()["error"]["message"], answer.text
        assert server.client.get("/v1/batches").json() == {"batches": []}

        server.client.headers["Authorization"] = dora
        rows = "prompt,steps,width,height\n" + "a,4,64,64\n" * 40 + "b,8,64,64\n"
        batch = send(server, rows).json()["id"]
    finally:
        server.process.kill()
        server.process.wait()
    again = Server(tmp_path, bundle=bundle)
    try:
        again.client.headers["Authorization"] = dora
        status = wait(again, batch)
        assert (status["done"], status["failed"]) == (40, 1)  # its key's limits hold after a restart, too
    finally:
        assert again.stop() == 0
