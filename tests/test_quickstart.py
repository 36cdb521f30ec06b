"""The quickstart with a preset of a few steps: stopped, started again, and looked at in the end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import trimesh

# The autoencoder learns enough for meshes of few faces: an untrained field's have many times more, and take as long.
PRESET = """
data: {level: core, count: 40, n_surface: 128, n_near: 128, n_uniform: 128, n_views: 2, image_size: 32}
clip:
  {steps: 3, batch_size: 8, save_every: 1, model: {text_width: 32, text_heads: 2, text_layers: 1,
    vision_cfg: {image_size: 32, layers: [1, 1, 1, 1], width: 8, head_width: 16}}}
autoencoder:
  {steps: 30, batch_size: 4, save_every: 1, n_surface: 64, n_field: 64, sheet_samples: 2, optim: {lr: 1.0e-2},
    model: {n_latents: 16, channels: 8, width: 32, heads: 2, hidden: 16}}
encode: {n_surface: 128}
denoiser: {steps: 3, batch_size: 4, save_every: 1, sheet_samples: 0, model: {width: 32, heads: 2, layers: 1}}
"""


@pytest.mark.timeout(900)  # a dozen processes, each of which imports torch, beside the other tests
def test_stopped_and_started_again_it_reaches_the_report(tmp_path):
    (tmp_path / "micro.yaml").write_text(PRESET)
    out = tmp_path / "run"
    words = [sys.executable, "-m", "shapeloom.launch.quickstart"]
    words += ["--preset", str(tmp_path / "micro.yaml"), "--out", str(out)]
    stopped = subprocess.Popen(
        words,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    while not (out / "autoencoder" / "log.jsonl").exists():
        assert stopped.poll() is None, "it ended before it could be stopped"
        time.sleep(0.05)
    os.killpg(stopped.pid, signal.SIGINT)  # as Ctrl-C does: to the whole group
    assert stopped.wait(timeout=200) != 0
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (out / "report.html").read_text()
    assert "generated R@1, hard pool" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert str(out / "report.html") in done.stdout and "autoencoder IoU" in done.stdout
    for path in (out / "samples").glob("*.glb"):
        assert len(trimesh.load(path, force="mesh").faces) > 0
