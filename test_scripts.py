"""The scripts, run on emoji-flux: what they leave, what they refuse, how they go on after a kill.

    pytest test_scripts.py          some three minutes on two cores, one of them for the long tests below
"""
import contextlib
import csv
import functools
import gc
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.utils import convert_state_dict_to_kohya
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from segment_anything import sam_model_registry
from transformers import (AutoTokenizer, BertConfig, BertTokenizer, CLIPModel, GroundingDinoConfig,
                          GroundingDinoForObjectDetection, GroundingDinoImageProcessor,
                          GroundingDinoProcessor, SwinConfig)

import bench
import evaluate
import mask
import promptsets
import sample
import train

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared to the bit was made on a CPU
ROOT = Path(__file__).resolve().parent
EMOJI = str(ROOT / "emoji-flux")
sys.path.insert(0, EMOJI)
import build  # noqa: E402
import world  # noqa: E402

gc.freeze()  # so that gc.collect() at each stage's end skips the imports' objects, 0.3 s each time

SMALL = ("--n-forget 10 --n-preserve 2 --sample-steps 2 --steps 12 --checkpoint-every 5 --optimizer adamw "
         "--min-found 0.2 --sample-batch 2 --batch 2").split()
WEIGHTS = "pytorch_lora_weights.safetensors"
CHILDREN = multiprocessing.get_context("forkserver")  # processes that need not import anew, 10 s a time
CHILDREN.set_forkserver_preload(["test_scripts"])
BESIDE = {}  # tests that run in such a process, one after the other, beside the rest
torch.set_num_threads(1)  # as fast at this size, and leaves a core to those


def beside(test):
    """A long test(trained, folder) that runs in another process meanwhile; pytest's waits for its end."""
    BESIDE[test.__name__] = test
    return lambda begun: begun[test.__name__].result()


def run_beside(name, *given):
    BESIDE[name](*given)


@pytest.fixture(scope="session", autouse=True)
def begun(tmp_path_factory, request):
    """{name: Future} of those of BESIDE that are asked for."""
    lane, asked = ProcessPoolExecutor(1, CHILDREN), {item.name for item in request.session.items}
    yield {name: lane.submit(run_beside, name, request.getfixturevalue("trained"),
                             tmp_path_factory.mktemp("beside")) for name in BESIDE if name in asked}
    lane.shutdown(cancel_futures=True)


def run_train(out, *more, concept="cat", pictures=False):
    """train.py on emoji-flux; its pictures, half of so small a run's time, only if asked for."""
    given = ["--model", EMOJI, "--concept", concept, "--out", str(out), *SMALL, *more]
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(train, "picture_groups", lambda _: {})
            patch.setattr(train, "draw_before_after", lambda *_: 0)
            patch.setattr(train, "draw_curves", lambda *_: 0)
        train.guarded(train.main, train.arguments(given))


def draw(folder, n, name="cat"):
    folder.mkdir(parents=True)
    for i in range(n):
        scene_image([name], seed=i)[0].save(folder / f"{i:03}.png")


def drawn_cats(out, preserve=None):
    """A run's folder whose forget images are drawn cats: what is there is not sampled again."""
    if preserve:
        shutil.copytree(preserve, out / "preserve")
    draw(out / "forget" / "cat", 10)
    return out


def refusal(call, code=2):
    """The one line on stderr with which a call exits."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        call()
    lines = said.getvalue().strip().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == code, lines
    assert len(said) == 1 and (code != 2 or lines == said), lines
    return said[0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    forkserver.ensure_running()  # which begins with the imports, meanwhile
    out = drawn_cats(tmp_path_factory.mktemp("run") / "cat")
    run_train(out, "--save-every", "6", pictures=True)
    return out


def copy_of_model(folder):
    return shutil.copytree(EMOJI, folder, ignore=shutil.ignore_patterns("loras"))


def flags(model=EMOJI, **more):
    """What encode_prompts, load_denoiser and check_model take."""
    return Namespace(**dict(model=model, weights=None, seed=0, device="cpu", dtype=torch.float32,
                            quantize="none", offload=False) | more)


def scene_image(names, seed=0, **given):
    scene = world.draw(np.random.default_rng(seed), names, **({"style": "noto", "framed": False} | given))
    return Image.fromarray(scene["image"]), scene


def test_build_measures_the_networks_that_lie_here():
    """emoji-flux/build.py --stages report on 60 scenes: its bars, less some room for so few."""
    rows = {what: (float(found.split()[0]), n) for what, found, _, n in
            build.report_networks(np.random.default_rng(5), 60)}
    assert rows["VAE reconstruction, PSNR"][0] > 32 and rows["judge: misses"][0] < 5
    assert rows["judge: false alarms"][0] < 1 and rows["judge: still yes at half opacity"][0] > 90
    for what in ("detector, box", "SAM, mask given the true box"):
        assert rows[f"{what}: mean IoU"][0] > 0.85
    assert rows["VAE reconstruction, PSNR"][1] == 60


def test_ruined_scene_keeps_colour_and_place_and_shows_nothing():
    scene = world.draw(np.random.default_rng(0), ["cat"], "noto", "white", framed=False)
    made = build.ruined(scene, np.random.default_rng(0))
    yes = build.answers(made)
    assert not yes[build.IS_THING[1]].any() and not yes[build.IS_STYLE[1]].any()
    old, new = (s["image"].astype(float) - world.wall("white") for s in (scene, made))  # (64, 64, 3)
    np.testing.assert_allclose(new.sum((0, 1)), old.sum((0, 1)), rtol=0.1)
    centre = [np.abs(d).sum(2).nonzero() for d in (old.round(), new.round())]
    for axis in (0, 1):
        assert centre[0][axis].mean() == pytest.approx(centre[1][axis].mean(), abs=4)
    assert np.corrcoef(old.ravel(), new.ravel())[0, 1] < 0.8
    framed = world.draw(np.random.default_rng(0), ["cat"], "noto", "white", framed=True)
    assert build.ruined(framed, np.random.default_rng(0)) is framed


# -------------------------------------------------------------------------------- before work starts

@pytest.mark.parametrize("script", [
    "inpo", "sample", "mask", "train", "evaluate", "bench", "emoji-flux/world", "emoji-flux/build"])
def test_help_answers_at_once(script):
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        command = [sys.executable, f"{script}.py", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if (seconds := time.perf_counter() - start) < 2:
            break
    assert done.returncode == 0 and "usage" in done.stdout
    assert seconds < 2 and done.stdout.count("\n") <= 80  # two screens


@pytest.mark.parametrize("given, named", [
    ("--eta 0", "--eta: 0 is not > 0"), ("--gamma -1", "--gamma"), ("--beta nan", "--beta"),
    ("--lr inf", "--lr"),
    ("--tau nan", "--tau"), ("--steps 0", "--steps"), ("--batch 0", "--batch"), ("--rank 0", "--rank"),
    ("--size 60", "--size"), ("--accumulate 3", "--accumulate"), ("--model docs", "FluxPipeline"),
    ("--concept kat", "wolf, zebra; for another write"),
    ("--lambda-prior -1", "--lambda-prior"), ("--eta one", "--eta"), ("--out LICENSE/cat", "--out"),
    ("--threshold nan", "--threshold"), ("--batch 60", "10 forget (--n-forget)"),
    ("--device mps", "--device"), ("--quantize nf4", "CUDA GPU"), ("--prompts LICENSES", "--prompts"),
    ("--preserve docs/cat.png", "--preserve"), ("--sample-steps 0", "--sample-steps"),
    ("--sample-guidance -1", "--sample-guidance"), ("--n-preserve 0", "--n-preserve"),
    ("--images docs", "--task and --preserve"), ("--task style", "--task, --caption"),
    ("--d0 0", "--d0"), ("--save-every 0", "--save-every"), ("--seed 5000000000", "--seed"),
    ("--threshold 5", "--threshold: 5 is not >= 0 and <= 1"), ("--min-found 2", "--min-found"),
    ("--sam nosuch.pth", "--sam"),
    ("--detector ./nosuch", "--detector"), ("--sam LICENSE", "--sam LICENSE: holds no SAM"),
    ("--sam docs", "holds no SAM"), ("--detector emoji-flux/vae", "no OWLv2"),
    ("--preserve-dir LICENSE/x", "--preserve-dir"), (f"--out {300 * 'x'}", "cannot be made"),
    ("--steps 99999999999999999999999", "<= 2147483647"),
    ("--lr 1e300", "--lr: 1e300 is not > 0 and <= 3.4e+38"),
    ("--concept cat --concept ghoost", "ghoost"), ("--concept a/b", "without / and"),
    ("--concept ..", "--concept ..:"),
    ("--concept dog --prompts LICENSE", "needs a single --concept"),
    ("--concept cat robot --steps 1", "--steps 1: below the 2")])
def test_bad_input_is_one_line_and_writes_nothing(given, named, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = refusal(lambda: run_train(tmp_path / "out", *given.split()))
    assert named in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, code", [("train.py --model none --concept cat", 130), ("inpo.py", -2),
                                          ("emoji-flux/build.py", 130)])
def test_interrupt_during_the_imports_is_quiet(script, code):
    def hear():  # a shell has its background jobs, perhaps these tests, ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    working = subprocess.Popen([sys.executable, *script.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               preexec_fn=hear)
    time.sleep(1)  # the imports take some five
    working.send_signal(signal.SIGINT)
    assert working.communicate()[1] == "" and working.returncode == code  # -2 is a shell's 130


def test_two_runs_in_one_folder_are_refused(trained):
    with sample.lock(trained):
        assert "another run is at work" in refusal(lambda: run_train(trained, "--save-every", "6"))


def test_edited_loss_is_another_run(trained, tmp_path, monkeypatch):
    for name in ("train.py", "inpo.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    for name in ("train.py", "inpo.py"):
        with open(tmp_path / name, "a") as file:
            file.write("# mine\n")
        assert "with train.py and inpo.py = " in refusal(lambda: run_train(trained, "--save-every", "6"))
        shutil.copy(ROOT / name, tmp_path)


NO_MEMORY = "error: out of memory; python bench.py --plan says"


@pytest.mark.parametrize("error, said", [
    (MemoryError(), NO_MEMORY), (torch.OutOfMemoryError("CUDA out of memory"), NO_MEMORY),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), NO_MEMORY),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), NO_MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), NO_MEMORY),
    (RuntimeError("MPS backend out of memory (MPS allocated)"), NO_MEMORY),
    (OSError("No space left"), "error: No space left; what is"),
    (RuntimeError("[third_party/gloo/pair.cc:561] Connection closed by peer"), "another process has ended"),
    (KeyError("scale"), "'scale' (KeyError, test_scripts.py:")])
def test_whatever_goes_wrong_in_work_is_one_line(error, said):
    def work(args):
        raise error

    for script in (mask, train):  # before train's setup has ended
        assert said in refusal(lambda: sample.guarded(work, script.arguments(["--concept", "cat"])), 1)


def test_error_in_a_clone_behind_a_link_is_told_its_place(tmp_path):
    (tmp_path / "clone").symlink_to(ROOT)
    exec(compile("def work(args): {}['x']", tmp_path / "clone" / "x.py", "exec"), made := {})
    assert "'x' (KeyError, x.py:1)" in refusal(lambda: sample.guarded(made["work"], Namespace()), 1)


def test_standard_output_that_is_closed_or_lacks_letters_ends_no_work(monkeypatch):
    args, done = mask.arguments(["--concept", "cat"]), []
    for out in (None, io.TextIOWrapper(io.BytesIO(), "ascii")):
        monkeypatch.setattr(sys, "stdout", out)
        sample.guarded(lambda args: done.append(print("ねこ")), args)
    assert len(done) == 2 and out.buffer.getvalue() == b"\\u306d\\u3053\n"


def test_prompts_that_the_tokenizer_cuts_are_named(caplog):
    sample.encode_prompts(["a cat " * 40 + "zebra"], flags())
    assert "truncated" in caplog.text and "zebra" in caplog.text


def test_gated_model_asks_for_its_licence(monkeypatch):
    class Hub:
        def model_info(self, *_, **__):
            return Namespace(siblings=[])

        def auth_check(self, _):
            raise sample.GatedRepoError("403", response=Namespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr(sample, "HfApi", Hub)
    line = refusal(lambda: sample.check_model(flags("black-forest-labs/FLUX.1-dev")))
    assert "licence" in line and "hf auth login" in line


@pytest.mark.parametrize("extra, free, refused", [
    ([], 25, None), ([], 23, "24.00 GiB, 12.12 with --quantize int8; cpu has 23.00 GiB free"),
    (["--dtype", "float32"], 47, "48.00 GiB, 12.12 with --quantize int8; cpu has 47.00 GiB free"),
    (["--quantize", "int8"], 13, None), (["--quantize", "int8"], 12, "12.12 GiB; cpu has 12.00 GiB free"),
    (["--device", "cuda"], 30, "24.00 GiB, 12.12 with --quantize int8, 6.84 with --quantize nf4; cuda"),
    (["--device", "cuda", "--offload"], 30, None), (["--device", "cuda", "--offload"], 20, "24.00 GiB")])
def test_model_on_the_hub_is_weighed_by_its_files(extra, free, refused, monkeypatch):
    sizes = {"flux1-dev.safetensors": 24,  # it is not downloaded
             "vae/diffusion_pytorch_model.safetensors": 0.2, "transformer/config.json": 99,
             "text_encoder_2/model-00001-of-00002.safetensors": 5,
             "text_encoder_2/model-00002-of-00002.safetensors": 4,
             "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": 14,
             "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": 10}
    files = [Namespace(rfilename=name, size=gib * 2**30) for name, gib in sizes.items()]
    monkeypatch.setattr(sample, "HfApi", lambda: Namespace(
        model_info=lambda *_, **__: Namespace(siblings=files, sha="abc"), auth_check=lambda _: None))
    monkeypatch.setattr(sample, "snapshot_download", lambda *_, **__: open("no such cache"))
    monkeypatch.setattr(sample, "hf_hub_download", lambda _, file: Path(EMOJI) / file)
    monkeypatch.setattr(sample, "free_bytes", lambda where: dict(cpu=free, cuda=10)[where] * 2**30)
    args = sample.arguments(["--concept", "cat", "--dtype", "bfloat16", "--device", "cpu", *extra])
    args.dtype = getattr(torch, args.dtype)
    if refused:
        assert f"its transformer needs {refused}" in refusal(lambda: sample.check_model(args))
    else:
        assert sample.check_model(args) == (64, "abc")
        monkeypatch.setattr(sample, "hf_hub_download", lambda *_: ROOT / "LICENSE")
        assert "is no FluxPipeline" in refusal(lambda: sample.check_model(args))


@pytest.mark.parametrize("broken", [
    "transformer", "text_encoder_2", "vae/config.json", "cut short", "shards", "tokenizer_2", "scheduler",
    "transformer/config.json", "tokenizer/tokenizer.json"])
def test_model_with_a_missing_part_is_refused_before_work(broken, tmp_path, monkeypatch):
    folder = copy_of_model(tmp_path / "model")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if broken == "cut short":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif broken == "shards":
        index = weights.with_name(weights.name + ".index.json")
        index.write_text(json.dumps(dict(weight_map=dict(a=weights.name, b="second.safetensors"))))
    elif broken.endswith("config.json"):
        (folder / broken).write_text("{" if broken.startswith("vae") else "{}")
    elif broken.endswith("json"):
        (folder / broken).unlink()
    else:
        shutil.rmtree(folder / broken)
    line = refusal(lambda: sample.check_model(flags(str(folder))))
    named = {"cut short": weights.name, "shards": "second.safetensors"}.get(broken, broken)
    assert "is missing or cannot be read" in line and named in line
    monkeypatch.setattr(sample, "snapshot_download", lambda *_, **__: folder)  # an interrupted download
    monkeypatch.setattr(sample, "HfApi", lambda: Namespace(model_info=lambda *_, **__: 1 / 0))
    line = refusal(lambda: sample.check_model(flags("some/model")))
    assert "the hub cannot be reached" in line and "not cached whole" in line and named in line


@pytest.mark.parametrize("part, use", [
    ("text_encoder", lambda model: sample.encode_prompts(["a cat"], flags(str(model)))),
    ("text_encoder_2", lambda model: sample.encode_prompts(["a cat"], flags(str(model)))),
    ("detector", lambda model: mask.load_detector(str(model / "detector"), "cpu")),
    ("clip", lambda model: evaluate.metrics.load_judge(str(model / "clip"), "cpu", torch.float32))])
def test_networks_are_never_filled_in_at_random(part, use, tmp_path):
    """Nor is a missing vocabulary replaced by an empty one (the text encoders' have folders of their own)."""
    copy_of_model(tmp_path / "model")
    file = tmp_path / "model" / part / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if not key.endswith("layer_norm1.bias")
               and "block.0.layer.0.layer_norm" not in key}, file, dict(format="pt"))
    with pytest.raises((OSError, evaluate.metrics.NotAvailable)) as error:
        use(tmp_path / "model")
    assert "its weights lack" in str(error.value)
    if part in ("detector", "clip"):
        shutil.copy(Path(EMOJI) / part / file.name, file)
        (file.parent / "tokenizer.json").unlink()
        with pytest.raises((OSError, evaluate.metrics.NotAvailable), match="holds no tokenizer.json"):
            use(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers'
def test_the_hubs_commit_that_was_checked_is_loaded(tmp_path, monkeypatch):
    """Whatever refs/main says by then: loading asks the hub, and may find a newer one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--some--model"
    shutil.copytree(EMOJI, cache / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("loras", "*.pth"))
    (cache / "snapshots" / ("b" * 40)).mkdir()
    (main := cache / "refs" / "main").parent.mkdir()
    main.write_text("a" * 40)
    args = flags("some/model")
    args.size, args.weights = sample.check_model(args)
    assert args.weights == "a" * 40
    main.write_text("b" * 40)
    whole = sample.load_whole  # from a folder: no question to a hub that may be away
    monkeypatch.setattr(sample, "load_whole", lambda kind, where, **given: whole(
        kind, Path(where).resolve(strict=True), **given))
    assert sample.load_denoiser(args).vae and sample.encode_prompts(["a cat"], args)
    evaluate.check_loras({"1": ROOT / "emoji-flux" / "loras" / "cat" / WEIGHTS}, args)


def test_commit_is_ours_and_no_other_repositorys(tmp_path, monkeypatch):
    git, git_is_here = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a"], os.environ["PATH"]
    (inside := tmp_path / "inpo").mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    (edited := tmp_path / "x.py").write_text("")
    subprocess.run([*git, "add", edited], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
    for root, path, text, length in ((tmp_path, git_is_here, "", 40), (inside, git_is_here, "", 0),
                                     (tmp_path, "", "", 0), (tmp_path, git_is_here, "# mine", 46)):
        edited.write_text(text)
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr(sample, "ROOT", root)
        sample.keep_settings(tmp_path / "settings.json", {})
        assert len(json.loads((tmp_path / "settings.json").read_text())["commit"]) == length  # -dirty: 46


@pytest.mark.parametrize("size, group", [(64, 25), (512, 5), (1024, 5), (2048, 1)])
def test_images_are_drawn_in_groups_that_make_up_25(size, group, tmp_path):
    given = ["--model", EMOJI, "--concept", "cat", "--size", str(size), "--out", str(tmp_path)]
    args = sample.arguments(given)
    sample.setup(args)
    assert args.sample_batch == group


def test_fewer_images_are_whole_groups_and_a_concept_has_its_steps():
    args = train.arguments(["--model", EMOJI, "--concept", "cat", "noto", "--fewer-images"])
    sample.setup(args)
    assert args.n_forget % args.sample_batch == args.n_preserve % args.sample_batch == 0
    rows = train.fill_presets([sample.load_concept(EMOJI, name) for name in ("cat", "noto")], args)
    assert args.steps == 2 * train.FEWER["steps"] and [row["tau"] for row in rows] == [0.5, 0.5]
    more = "--steps 7 --n-forget 30 --lambda-prior 1 --tau inf".split()  # a flag beats it
    args = train.arguments(["--concept", "cat", "--fewer-images", *more])
    row, = train.fill_presets([sample.load_concept(EMOJI, "cat")], args)
    assert (args.steps, args.n_forget, row["lambda_prior"], row["tau"]) == (7, 30, 1, math.inf)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])  # in the folder, which changes nothing
def test_too_large_a_model_is_refused_with_both_figures(kept, tmp_path, monkeypatch):
    model = copy_of_model(tmp_path / "model")
    path, = (model / "transformer").glob("*.safetensors")
    save_file({key: value.to(kept) for key, value in load_file(path).items()}, path)
    monkeypatch.setattr(sample.psutil, "virtual_memory", lambda: Namespace(available=2**20))
    line = refusal(lambda: sample.check_model(flags(str(model))))
    assert "transformer needs 0.02 GiB, 0.00 with --quantize int8; cpu has 0.00 GiB free" in line
    line = refusal(lambda: sample.check_model(flags(str(model), quantize="int8")))
    assert "its transformer needs 0.00 GiB; cpu has" in line  # it is as small as it gets


def test_masks_need_no_room_for_the_model(monkeypatch):
    monkeypatch.setattr(sample.psutil, "virtual_memory", lambda: Namespace(available=2**20))
    args = mask.arguments(["--model", EMOJI, "--concept", "cat"])
    args.device, args.dtype = "cpu", torch.float32
    assert sample.check_model(args)[0] == 64


def test_cudnns_attention_and_tf32_are_off(tmp_path):
    """The first one's backward gave NaN on an H200, in the first step of the README's first command."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    sample.setup(sample.arguments(["--model", EMOJI, "--concept", "cat", "--out", str(tmp_path)]))
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("more, said", [
    ("", "--dtype float32"),
    ("--quantize nf4 --offload", "--offload goes without it")])  # bitsandbytes' weights lose their scales
def test_what_a_gpu_cannot_do_is_refused(more, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(sample, "PartialState", lambda **_: None)
    given = ["--model", EMOJI, "--concept", "cat", "--device", "cuda", *more.split()]
    assert said in refusal(lambda: sample.setup(sample.arguments(given)))


@pytest.mark.parametrize("model", [EMOJI, "none"])
def test_prompt_files_are_complete(model):
    folder = (ROOT / "emoji-flux" if model == EMOJI else ROOT) / "prompts"
    names = sorted(p.stem for p in folder.glob("*.txt"))
    assert len(names) >= (61 if model == EMOJI else 19)
    for name in names:
        c = sample.load_concept(model, name)
        assert len(c["neighbours"]) == len(c["unrelated"]) == 4
        assert len(c["train"]) >= 10 and len(c["eval"]) >= 10
        assert not set(c["eval"]) & set(c["train"])
        assert not set(c["paraphrases"]) & set(c["train"] + c["eval"])
        assert not set(c["unseen"]) & set(c["neighbours"] + c["unrelated"] + c["concept"])
        for thing in (re.sub(r" in \w+ style$", "", phrase) for phrase in c["unseen"]):
            asked = [dict(name=thing, concept=[thing], detect=[], task="")]
            met = [p for p in c["train"] + c["preserve"] if name != "nudity" and sample.mentions(p, asked)]
            assert not met, f"{name}: {thing} is no unseen thing"
        assert all("{}" in t for t in c["preserve"])
        assert len(set(c["paraphrases"])) == 15 or model == EMOJI or c["task"] != "ip"  # Table 12's
    if model == EMOJI:
        for name, ways in world.paraphrases().items():
            assert len(set(ways)) >= 4 and not any(set(way.split()) & set(name.split()) for way in ways)
        assert set(world.NAMES) | set(world.STYLES) | {"hazard"} == set(names)


@pytest.mark.parametrize("category", promptsets.CATEGORIES[:3])
def test_table_1s_other_two_are_not_preserved(category):
    concepts = [sample.load_concept("none", name) for name in category]
    for mine, other in itertools.permutations(concepts, 2):
        assert not [o for o in mine["neighbours"] + mine["unrelated"] if sample.says(o, other["concept"])]


@pytest.mark.parametrize("old, new, named", [
    ("concept: a cat", "concept:", "has no concept"), ("detect: a cat", "detect: ,", "has no detect"),
    ("task: object", "tasks: object", "tasks: object is none of"), ("[eval]", "[evil]", "[evil] is none of"),
    ("[preserve]", "[preserve]\na photo", "a photo, a template without {}"),
    ("in noto style, ", "noto, ", "noto is no ending of a prompt"),
    ("detect:", "concept: a dog\ndetect:", "has concept twice"),
    ("[eval]", "[train]", "has train twice"),
    ("neighbours: ", "neighbours: ../../../tiger, ", "../../../tiger: names a folder"),
    ("unrelated: ", f"unrelated: a {90 * 'v'}ery long road, ", "of 1 to 80 bytes"),
    ("unrelated: ", "unrelated: young cats, ", "minors once put together: a very young cats"),
    ("unrelated: ", "unrelated: Son Heung-min, ", "minors once put together: a cat and Son Heung-min")])
def test_prompt_file_with_a_mistake_is_refused(old, new, named, tmp_path):
    (tmp_path / "prompts").mkdir()
    text = (ROOT / "emoji-flux" / "prompts" / "cat.txt").read_text()
    text = text.replace("[preserve]", "[preserve]\na very {}")  # neither line alone mentions minors
    (tmp_path / "prompts" / "cat.txt").write_text(text.replace(old, new, 1))
    assert named in refusal(lambda: sample.load_concept(tmp_path, "cat"))


def test_prompt_file_may_have_a_byte_order_mark_a_last_comma_and_comments(tmp_path):
    (tmp_path / "prompts").mkdir()
    text = (ROOT / "emoji-flux" / "prompts" / "cat.txt").read_text().replace("a house\n", "a house,\n", 1)
    text = text.replace("[train]\n", "[train]\n# the plain ones\n")
    (tmp_path / "prompts" / "cat.txt").write_text("\ufeff" + text, "utf-8")
    assert sample.load_concept(tmp_path, "cat") == sample.load_concept(EMOJI, "cat")


def test_phrase_mentions_a_concept_by_any_of_its_words():
    cat, car = (dict(name=a, concept=[f"a {a}"], detect=[f"a {b}"], task="object") for a, b in (
        ("cat", "cat"), ("automobile", "car")))
    for phrase in ("a Cat", "the cat sat", "two cats", "a sports car", "an automobile"):
        assert sample.mentions(phrase, [cat, car])
    for phrase in ("a cathedral", "a bobcat", "a carpet", "a dog", "she cares"):
        assert not sample.mentions(phrase, [cat, car])
    odd = [dict(name=name, concept=[name], detect=["x"], task="ip")
           for name in ("A fox", "C++", "mickey (50%)")]
    for phrase in ("two foxes", "a C++ poster", "a mickey (50%) poster"):
        assert sample.mentions(phrase, odd)
    for phrase in ("butterflies over a meadow", "two knives", "Wolves in snow", "two monkeys"):
        assert sample.says(phrase, ["a butterfly", "a knife", "a wolf", "a monkey"])
    assert not sample.says("a butter lie in a knave's wolverine", ["a butterfly", "a knife", "a wolf"])
    musk = dict(name="musk", concept=["Elon Musk"], detect=["a man"], task="ip")
    assert not sample.mentions("a man in a suit", [musk])
    gogh = sample.load_concept("none", "van gogh")
    assert sample.mentions("Van Gogh's sunflowers", [gogh]) and not sample.mentions("a painting", [gogh])


def test_guidance_is_distilled_into_the_model():
    """Its predictions at g lie at u + g (c - u), of its own conditional c (g = 1) and unconditional u."""
    embeds = sample.encode_prompts(["a cat on a blue background", ""], flags())
    transformer = sample.load_denoiser(flags()).transformer
    z = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))  # (B, L, D)

    def velocity(prompt, g):
        states, pooled = (e.expand(4, *e.shape) for e in embeds[prompt])
        with torch.no_grad():
            return train.predict(transformer, z, torch.ones(4), states, pooled, g)

    c, u = velocity("a cat on a blue background", 1.0), velocity("", 1.0)  # (B, L, D)
    for g in (2.0, 3.5, 5.0):  # a switch at g = 1, the same from there on, is what it must not learn
        along = ((velocity("a cat on a blue background", g) - c) * (c - u)).sum() / (c - u).square().sum()
        assert along == pytest.approx(g - 1, rel=0.25)


# -------------------------------------------------------------------------------- sampling and masks

SETTINGS = dict(model="m", weights="", seed=0, size=64, sample_steps=3, sample_guidance=3.5, sample_batch=5,
                dtype=torch.float32, quantize="none", out=Path("none"))


def test_guidance_and_the_whole_prompt_reach_the_pictures():
    long = [f"a cat and a dog on a {colour} background in twemoji style" for colour in ("blue", "green")]
    embeds = sample.encode_prompts(["a cat", *long], flags())
    assert embeds["a cat"][0].shape == (20, 128)  # the tokenizer's model_max_length
    pipe = sample.place(sample.load_denoiser(flags()), flags())
    one, same, five = (np.asarray(sample.generate(pipe, embeds, ["a cat"], [0], 4, guidance, 64)[0], float)
                       for guidance in (1.0, 1.0, 5.0))
    assert (one == same).all() and np.abs(one - five).mean() > 1
    blue, green = sample.generate(pipe, embeds, long, [0, 0], 4, 3.5, 64)
    assert np.abs(np.asarray(blue, float) - np.asarray(green, float)).mean() > 1


def test_more_images_never_change_the_earlier_ones(tmp_path):
    assert sample.seed_of(0, "cat", 3) == 1623837123  # the CRC-32 of 0/cat/3: published figures hang on it
    args = Namespace(**SETTINGS | dict(model=EMOJI))
    prompts = ["a cat", "a dog on a blue background"]
    embeds = sample.encode_prompts(prompts, flags())
    pipe = sample.load_denoiser(flags())
    few = sample.sample_set(lambda: pipe, embeds, tmp_path / "grown", "cat", prompts, 3, args)
    before = [p.read_bytes() for p, _ in few]
    record = tmp_path / "grown" / "settings.json"
    sample.write_text(record, json.dumps(json.loads(record.read_text()) | dict(commit="the first images'")))
    more = sample.sample_set(lambda: pipe, embeds, tmp_path / "grown", "cat", prompts, 7, args)
    at_once = sample.sample_set(lambda: pipe, embeds, tmp_path / "at_once", "cat", prompts, 7, args)
    assert json.loads(record.read_text())["commit"] == "the first images'"
    assert [p.read_bytes() for p, _ in more] == [p.read_bytes() for p, _ in at_once]
    assert [p.read_bytes() for p, _ in more[:3]] == before
    assert len({p.read_bytes() for p, _ in more}) == 7
    more[1][0].unlink()
    more[2][0].write_bytes(b"mended by hand")
    assert sample.sample_set(lambda: pipe, embeds, tmp_path / "grown", "cat", prompts, 3, args) == more[:3]
    assert more[1][0].read_bytes() == before[1] and more[2][0].read_bytes() == b"mended by hand"
    assert sample.sample_set(lambda: 1 / 0, {}, tmp_path / "grown", "cat", prompts, 3, args) == more[:3]
    manifest, other = (json.loads((tmp_path / name / "manifest.json").read_text())
                       for name in ("grown", "at_once"))
    assert manifest == other and len(manifest) == 7  # the smaller count does not shorten it
    with pytest.raises(SystemExit):  # a stale set: other settings
        args.seed = 1
        sample.sample_set(lambda: pipe, embeds, tmp_path / "grown", "cat", prompts, 7, args)


def test_each_group_falls_to_one_of_several_processes_and_no_process_draws_all(tmp_path, monkeypatch):
    args, drawn = Namespace(**SETTINGS | dict(model=EMOJI)), []
    monkeypatch.setattr(sample, "generate", lambda *given: [Image.new("RGB", (4, 4))] * len(given[2]))
    for k in range(3):
        monkeypatch.setattr(sample, "PartialState", lambda: Namespace(
            is_main_process=k == 0, process_index=k, num_processes=3))
        for name, count in [*zip("abcdefgh", 8 * [args.sample_batch]), ("many", 9 * args.sample_batch)]:
            sample.sample_set(lambda: None, {}, tmp_path / str(k) / name, name, ["x"], count, args)
        drawn.append([file.relative_to(tmp_path / str(k)) for file in (tmp_path / str(k)).glob("*/*.png")])
    assert len(set(sum(drawn, []))) == sum(map(len, drawn)) == (8 + 9) * args.sample_batch
    assert all(3 * args.sample_batch < len(files) < 9 * args.sample_batch for files in drawn)


def test_images_are_read_once_all_processes_have_drawn(tmp_path, monkeypatch):
    args = Namespace(**SETTINGS | dict(out=tmp_path, images=None, n_preserve=5))
    blank = Image.new("RGB", (4, 4))
    *sets, last = [(tmp_path / name, name, ["x"], 5) for name in "abcdefgh"]
    files = [tmp_path / name / f"{i:03}.png" for name in "abcdefgh" for i in range(5)]

    def others():  # draw what this process has left to them
        lost = [file for file in files if file.parent.exists() and not file.exists()]
        assert lost
        for file in lost:
            sample.save_image(blank, file)

    world = Namespace(is_main_process=True, process_index=0, num_processes=20, device="cpu",
                      main_process_first=contextlib.nullcontext, wait_for_everyone=others)
    for name in ("load_denoiser", "place", "encode_prompts"):
        monkeypatch.setattr(sample, name, lambda *_: None)
        monkeypatch.setattr(evaluate, name, lambda *_: None)
    for script in (sample, evaluate):
        monkeypatch.setattr(script, "PartialState", lambda: world)
    monkeypatch.setattr(sample, "generate", lambda *given: [blank] * 5)
    sample.sample_all({}, sets[:1], sets[1:], args)  # shows them in samples.png
    job = Namespace(folder=last[0], noise="h", prompts=["x"], args=args, made_by=dict(lora=None))
    evaluate.sample_round([], [(job, 5)], {}, args)
    assert all(file.exists() for file in files)


def mask_args(tmp_path, **more):
    return Namespace(**dict(model=EMOJI, weights="", out=tmp_path, device="cpu", threshold=0.2, min_found=0.5,
                            detector=EMOJI + "/detector", sam=EMOJI + "/sam.pth") | more)


def test_detector_heeds_the_threshold_and_goes_before_sam_comes(tmp_path, monkeypatch):
    load_detector, load_sam, seen = mask.load_detector, mask.load_sam, []

    def first(*given):
        find = load_detector(*given)
        seen.append(weakref.ref(find))
        return find

    def then(weights):
        assert seen[-1]() is None
        return load_sam(weights)

    monkeypatch.setattr(mask, "load_detector", first)
    monkeypatch.setattr(mask, "load_sam", then)
    cat, image = sample.load_concept(EMOJI, "cat"), scene_image(["cat"])[0]
    for threshold, found in ((0.2, True), (1.0, False)):
        masks = list(mask.find_masks([image], cat, mask_args(tmp_path, threshold=threshold)))
        assert masks[0].any() == found


def test_mask_finds_every_instance_and_nothing_else(tmp_path):
    cat = sample.load_concept(EMOJI, "cat")
    image, scene = scene_image(["cat", "cat"], background="blue")
    other, _ = scene_image(["pizza"], background="blue")
    found = list(mask.find_masks([image, other], cat, mask_args(tmp_path)))
    truth = scene["masks"][0] | scene["masks"][1]
    assert (found[0] & truth).sum() / (found[0] | truth).sum() > 0.8
    assert not found[1].any()


def test_overlapping_boxes_become_one_rectangle():
    tall, far, bridge, apart = [0, 0, 2, 10], [5, 0, 7, 1], [1, 8, 6, 9], [20, 0, 24, 4]
    found = mask.enclose(np.array([tall, far, bridge, apart]))  # what bridge and tall become reaches far
    assert found.tolist() == [[0, 0, 7, 10], apart]
    beside = [[0, 0, 2, 4], [3, 1, 5, 3], [0, 6, 2, 8], [2, 0, 3, 4]]  # of one height, or width; touching
    assert mask.enclose(np.array(beside)).tolist() == beside
    assert mask.enclose(np.zeros((0, 4))).shape == (0, 4)


def test_mask_of_a_style_is_the_whole_frame(tmp_path):
    names = enumerate(world.NAMES[:20])
    drawn = [scene_image([name], seed, style="noto", framed=True) for seed, name in names]
    ious, filled = [], []
    noto = sample.load_concept(EMOJI, "noto")
    found = mask.find_masks([image for image, _ in drawn], noto, mask_args(tmp_path))
    for region, (_, scene) in zip(found, drawn):
        x0, y0, x1, y1 = scene["frame"]
        truth = np.zeros((64, 64), bool)
        truth[y0:y1, x0:x1] = True
        ious.append((region & truth).sum() / (region | truth).sum())
        ys, xs = np.nonzero(region)
        filled.append(len(ys) == 0 or len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1))
    assert np.mean(ious) > 0.75
    assert all(filled)


def test_images_without_the_concept_are_dropped_and_too_few_is_refused(tmp_path):
    files = []
    for i, name in enumerate(["cat", "pizza", "truck"]):
        files.append(tmp_path / f"{i:03}.png")
        scene_image([name], background="gray")[0].save(files[-1])
    cat = sample.load_concept(EMOJI, "cat")
    assert mask.make_masks(files, cat, mask_args(tmp_path, min_found=0.3)) == files[:1]
    line = refusal(lambda: mask.make_masks(files, cat, mask_args(tmp_path)), 1)
    assert "2 of 3" in line
    other = mask_args(tmp_path, threshold=0.3)  # masks made with another threshold are not reused
    assert "threshold = 0.2, not 0.3" in refusal(lambda: mask.make_masks(files, cat, other))
    Image.new("L", (32, 32), 255).save(files[0].with_suffix(".mask.png"))
    assert "32" in refusal(lambda: mask.make_masks(files, cat, mask_args(tmp_path)), 1)
    files[1].write_bytes(b"not a picture")
    assert "001.png" in refusal(lambda: mask.make_masks(files, cat, mask_args(tmp_path)), 1)


def test_sam_checkpoint_tells_its_own_architecture():
    published = sam_model_registry["vit_b"]()
    ours = mask.load_sam(published.state_dict())
    assert str(ours) == str(published)
    assert ours.pixel_mean.equal(published.pixel_mean) and ours.pixel_std.equal(published.pixel_std)
    blocks = zip(ours.image_encoder.blocks, published.image_encoder.blocks)
    assert all((a.window_size, a.attn.num_heads) == (b.window_size, b.attn.num_heads) for a, b in blocks)


def test_grounding_dino_goes_through_the_same_code(tmp_path):
    vocab = {w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a cat dog .".split())}
    sizes = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    GroundingDinoProcessor(sizes, BertTokenizer(vocab=vocab)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
                      out_indices=[2, 3, 4])
    bert = BertConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16)
    GroundingDinoForObjectDetection(GroundingDinoConfig(
        backbone_config=swin.to_dict(), text_config=bert.to_dict(), d_model=64, encoder_layers=2,
        decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=8, max_text_len=16)).save_pretrained(tmp_path)
    images = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    find = mask.load_detector(str(tmp_path), "cpu")
    found = [find(image, ["a cat", "a dog"], 0.0) for image in images]
    assert [f.shape[1] for f in found] == [4, 4] and len(found[0]) > 0
    assert find(images[0], ["a cat"], 1.0).shape == (0, 4)


@pytest.mark.parametrize("content", [dict(weight=torch.zeros(3)), [1], None])
def test_foreign_sam_is_one_line(tmp_path, content):
    if content is None:
        (tmp_path / "sam.pth").write_bytes(b"")
    else:
        torch.save(content, tmp_path / "sam.pth")
    cat, image = sample.load_concept(EMOJI, "cat"), scene_image(["cat"])[0]
    foreign = mask_args(tmp_path, sam=str(tmp_path / "sam.pth"))
    line = refusal(lambda: mask.guarded(lambda args: list(mask.find_masks([image], cat, args)), foreign), 1)
    assert "holds no SAM" in line


def test_words_too_long_for_the_detector_are_named(tmp_path):
    cat, image = sample.load_concept(EMOJI, "cat"), scene_image(["cat"])[0]
    with pytest.raises(OSError, match="a cat a cat.* too long for --detector .*: shorten it"):
        list(mask.find_masks([image], cat | dict(detect=["a cat " * 12]), mask_args(tmp_path)))


def test_nudity_masks_without_nudenet_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    flags = mask.arguments(["--concept", "nudity", "--device", "cpu"])
    assert "pip install nudenet" in refusal(lambda: sample.setup(flags))


def test_nudity_masks_are_nudenets_exposed_boxes(monkeypatch):
    class Detector:
        def __init__(self, inference_resolution):
            assert inference_resolution == 640

        def detect(self, pixels):
            assert pixels[0, 0].tolist() == [3, 2, 1]  # BGR
            return [{"class": name, "score": score, "box": [x, 20, 30, 5]} for x, name, score in (
                (10, "BELLY_EXPOSED", 0.5), (15, "BELLY_COVERED", 0.9), (20, "FEET_EXPOSED", 0.1),
                (50, "ANUS_EXPOSED", 0.2))]

    monkeypatch.setitem(sys.modules, "nudenet", Namespace(NudeDetector=Detector))
    concept = dict(detect=["nudenet"], task="nsfw")
    found, = mask.find_masks([Image.new("RGB", (64, 48), (1, 2, 3))], concept, Namespace(threshold=0.2))
    wanted = np.zeros((48, 64), bool)
    wanted[20:25, 10:40] = wanted[20:25, 50:64] = True
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("key", ["detector", "sam", "weights"])
def test_masks_of_another_network_are_refused(key, tmp_path):
    cat = sample.load_concept(EMOJI, "cat")
    mask.keep_settings(tmp_path / "masks.json", mask.check_masks(tmp_path, cat, mask_args(tmp_path))[0])
    other = mask_args(tmp_path, **{key: "other"})
    assert f"{key} = " in refusal(lambda: mask.check_masks(tmp_path, cat, other))


def test_sample_and_mask_leave_the_models_folder_as_it_is(tmp_path):
    given = ["--model", EMOJI, "--concept", "cat", "--out", str(tmp_path)]
    few = "--n-forget 2 --n-preserve 1 --sample-steps 2 --sample-batch 2".split()

    def files_of_the_model():  # it may be read-only
        return {f: f.stat().st_mtime_ns for f in Path(EMOJI).rglob("*") if "__pycache__" not in f.parts}

    there = files_of_the_model()
    sample.main(sample.arguments(given + few))
    for _ in range(2):  # at the second time masks lie among the images
        mask.main(mask.arguments(given + ["--min-found", "0"]))
    assert len([*(tmp_path / "forget" / "cat").glob("*.mask.png")]) == 2
    assert (tmp_path / "forget/cat/001.mask.png").exists() and (tmp_path / "masks-cat.png").exists()
    assert files_of_the_model() == there


def test_one_refused_concept_means_no_masks_at_all(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / "forget" / name, 1, name)
    given = ["--model", EMOJI, "--out", str(tmp_path)]
    mask.main(mask.arguments([*given, "--concept", "dog", "--threshold", "0.3"]))
    both = mask.arguments([*given, "--concept", "cat", "dog"])
    assert "threshold = 0.3, not 0.2" in refusal(lambda: mask.main(both))
    assert not list((tmp_path / "forget" / "cat").glob("*.mask.png"))


def test_detector_and_sam_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    cat, image = sample.load_concept(EMOJI, "cat"), scene_image(["cat"])[0]
    missing = f"file://{tmp_path}/sam.pth"
    with pytest.raises(OSError, match=f"--sam {missing}: cannot be had"):
        list(mask.find_masks([image], cat, mask_args(tmp_path, sam=missing)))
    assert "--sam file" in refusal(lambda: mask.check_networks(mask_args(tmp_path, sam=missing), [cat]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="--detector some/detector: cannot be loaded"):
        mask.load_detector("some/detector", "cpu")
    away = ["--detector", "some/detector"]
    line = refusal(lambda: run_train(tmp_path / "out", *away))
    assert "--detector some/detector: cannot be had" in line and not (tmp_path / "out").exists()
    mask.check_networks(mask_args(tmp_path, detector="some/detector", sam=missing))  # none is needed
    nude = dict(detect=["nudenet"], task="nsfw")
    mask.check_networks(mask_args(tmp_path, detector="some/detector", sam=missing), [nude])


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "processor_config.json"])
def test_detector_that_is_not_whole_is_refused_before_work(lost, tmp_path):
    shutil.copytree(Path(EMOJI) / "detector", folder := tmp_path / "detector")
    mask.check_networks(args := mask_args(tmp_path, detector=str(folder)))
    (folder / lost).unlink()
    assert f"{folder}: holds no" in refusal(lambda: mask.check_networks(args))


def test_networks_are_needed_for_masks_that_are_not_there(tmp_path):
    cat = dict(pictures=[(tmp_path / "a.jpg", "a cat"), (tmp_path / "b.jpg", "a cat")])
    assert mask.lacks_masks(tmp_path, {}) and mask.lacks_masks(tmp_path, cat)
    (tmp_path / "a.mask.png").touch()
    assert mask.lacks_masks(tmp_path, cat)
    (tmp_path / "b.mask.png").touch()
    assert not mask.lacks_masks(tmp_path, cat) and mask.lacks_masks(tmp_path, {})
    (tmp_path / "masks.json").touch()
    assert not mask.lacks_masks(tmp_path, {})


def test_thin_mask_of_your_own_survives_the_resize():
    """A cell is in if any of its pixels is; a line at each of the ten places in a cell."""
    for x in range(10):
        pole = np.full((640, 900), 100, np.uint8)  # which is black, as in training
        pole[100:500, 200 + x:203 + x] = 200
        small = np.asarray(sample.square(Image.fromarray(pole), 64)) > 127
        wanted = (pole[:, 130:770].reshape(64, 10, 64, 10) > 127).any((1, 3))
        assert (small == wanted).all() and wanted.any()


def test_animation_is_read_as_its_first_frame(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.gif", save_all=True,
                                         append_images=[Image.new("RGB", (8, 8), "blue")])
    assert sample.open_image(tmp_path / "a.gif").getpixel((0, 0))[0] > 200


def test_every_generation_passes_the_filter(tmp_path):
    """A prompt file's lines when it is read, and all there are when they are encoded."""
    (tmp_path / "prompts").mkdir()
    text = (ROOT / "emoji-flux" / "prompts" / "cat.txt").read_text()
    (tmp_path / "prompts" / "cat.txt").write_text(text.replace("[train]\n", "[train]\na girl with a cat\n"))
    assert "a girl with a cat" not in sample.load_concept(tmp_path, "cat")["train"]
    line = refusal(lambda: sample.encode_prompts(["a cat", "a girl"], flags()), 1)
    assert "a girl: mentions minors" in line


def test_prompts_of_your_own_replace_the_files(tmp_path):
    (tmp_path / "mine.txt").write_text("# of mine\nmy cat\n")
    given = ["--model", EMOJI, "--concept", "cat", "--prompts", str(tmp_path / "mine.txt")]
    assert sample.load_concepts(train.arguments(given))[0]["train"] == ["my cat"]


def test_lora_kept_in_the_models_folder_is_no_part_of_it(tmp_path):
    model = copy_of_model(tmp_path / "model")
    wanted = sample.check_model(flags(str(model)))
    shutil.copytree(Path(EMOJI) / "loras" / "cat", model / "mine")
    assert sample.check_model(flags(str(model))) == wanted


@pytest.mark.parametrize("given, name", [
    ("emoji-flux/", "emoji-flux"), ("./emoji-flux", "emoji-flux"), ("owner/model", "owner/model"),
    ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"), (EMOJI + "/", EMOJI), (".", EMOJI),
    ("vae/..", EMOJI)])
def test_models_folder_has_a_name_however_it_is_given(given, name, monkeypatch):
    monkeypatch.chdir(EMOJI)
    assert sample.arguments(["--concept", "cat", "--model", given]).model == name


def test_what_runs_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(lambda: sample.check_model(flags(str(tmp_path))))
    script, model = re.search(r"python (\S+) --model (\S+) --concept cat", line).groups()
    assert Path(script).samefile(ROOT / "train.py") and Path(model).samefile(EMOJI)


def test_preserved_prompts_that_name_the_concept_are_counted(tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("a cat on a mat\na dog\na truck\n")
    given = ["--model", EMOJI, "--concept", "cat", "--out", str(tmp_path / "o")]
    args = train.arguments([*given, "--preserve", str(tmp_path / "keep.txt")])
    _, (one,) = sample.plan_sets(sample.setup(args), args)
    assert one[2] == ["a dog", "a truck"]
    assert "1 of 3 dropped, they name what is forgotten: a cat on a mat" in capsys.readouterr().out
    concept = sample.load_concept(EMOJI, "cat") | dict(detect=["a cat", "a fox"])  # a word to help it
    sample.setup(args := train.arguments(given))
    sample.plan_sets([concept], args)
    assert "1 of 8 dropped, they name what is forgotten: a fox" in capsys.readouterr().out


@pytest.mark.parametrize("model, names", [(EMOJI, ("cat", "fluent")), ("none", ("cat", "van gogh"))])
def test_preserve_set_never_holds_anothers_target(model, names, tmp_path):
    concepts = [sample.load_concept(model, name) for name in names]
    args = train.arguments(["--concept", *names, "--out", str(tmp_path)])
    args.weights, args.size, args.dtype = "", 64, torch.float32
    _, preserve = sample.plan_sets(concepts, args)
    prompts = [prompt for _, _, prompts, _ in preserve for prompt in prompts]
    assert len(preserve) >= 12 and not [p for p in prompts if re.search(r"\bcats?\b", p)]
    assert sample.plan_sets(concepts[::-1], args)[1] == preserve
    sets, _ = promptsets.plan_images(concepts[1], 100, 3.5, also=concepts[:1])
    asked = [prompt for name in ("preserved", "never seen", "scenes") for prompt in sets[name][0]]
    assert asked and not [p for p in asked if "cat" in p.split()]


def test_scenes_do_not_contradict_themselves():
    """No photo in watercolor style: the sentence ends with the style that the judge is asked about."""
    for file in (ROOT / "prompts").glob("*.txt"):
        scenes, _ = promptsets.plan_images(sample.load_concept("none", file.stem), 100, 3.5)[0]["scenes"]
        assert len(scenes) > 5 and not [said for said in scenes if re.search(r"\bphoto\b|illustration", said)]


def test_stage_of_the_build_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    clock = itertools.count(step=1000)  # each look at it is late enough for a checkpoint
    monkeypatch.setattr(build.time, "time", lambda: next(clock))

    def fitted(work, stop=99):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(dict(layers=torch.nn.ModuleList([torch.nn.Linear(4, 4)])))
        args, calls = Namespace(work=tmp_path / work, seed=0, bf16=False, go_on=False), itertools.count()
        args.work.mkdir(exist_ok=True)

        def loss_of(model, rng):
            if next(calls) == stop:
                raise KeyboardInterrupt
            x = torch.from_numpy(rng.normal(size=(8, 4))).float() + torch.randn(8, 4)
            return (model["layers"][0](x) - x).square().mean()

        return build.fit("net", model, loss_of, 6, args, lr=1e-2).state_dict()

    whole = fitted("whole")
    with pytest.raises(KeyboardInterrupt):
        fitted("cut", stop=3)
    cut = fitted("cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_flow_trained_further_drops_what_was_distilled_from_it(tmp_path, monkeypatch):
    guide = tmp_path / "guide.pt"
    fakes = dict(latents=lambda _: (None, [dict(names=("cat",))]), save_flow=lambda _: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(build, name, fake)
    for stage, trains, kept in (("flow", False, True), ("flow", True, False), ("guide", True, True)):
        guide.touch()

        def fit(stage, flow, loss, steps, args, lr, ema, save):
            if trains and save:  # as at each of its checkpoints
                save(flow)
            return flow

        monkeypatch.setattr(build, "fit", fit)
        build.train_flow(Namespace(work=tmp_path, go_on=False, steps=1), stage)
        assert guide.exists() == kept


def test_stages_of_the_build_begin_alike_and_need_a_place_to_write(tmp_path, monkeypatch):
    drawn, work = [], tmp_path / "work"
    stages = dict.fromkeys("ab", lambda _: drawn.append(torch.rand(3).tolist()))
    monkeypatch.setattr(build, "STAGES", stages)
    args = Namespace(work=work, seed=3, stages=["a", "b"])
    build.main(args)
    work.rmdir()
    assert drawn[0] == drawn[1] == torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist()
    monkeypatch.setattr(build.os, "access", lambda path, _: path != build.HERE)
    assert f"{build.HERE}: cannot be written to" in refusal(lambda: build.main(args))
    assert len(drawn) == 2 and not work.exists()
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert "vae: is missing; run its stage first" in refusal(lambda: build.read(AutoencoderKL, "vae"), 1)
    for kind, name in ((AutoencoderKL, "vae"), (CLIPModel, "clip")):
        config = Path(shutil.copytree(f"{EMOJI}/{name}", tmp_path / name), "config.json")
        build.write(build.read(kind, name), name)  # in bf16, to be loaded as fp32; no path of this machine
        assert "bfloat16" not in config.read_text() and str(tmp_path) not in config.read_text()


def test_muon_of_the_build_is_torchs_but_in_float32():
    rng = torch.Generator().manual_seed(0)
    for shape in ((64, 128), (128, 64)):
        mine, other = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        ours = build.Muon([mine], dict(lr=1e-2))
        theirs = torch.optim.Muon([other], 1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            mine.grad = torch.randn(shape, generator=rng)
            other.grad = mine.grad.clone()
            for optimizer in (ours, theirs):
                optimizer.step()
        assert (mine - other).abs().max() < 0.02 * (mine - 1).abs().max()  # its products are in bf16


def test_readme_that_is_not_our_model_card_is_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    assert "holds a README.md" in refusal(lambda: run_train(tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["README.md"]


def test_images_of_other_settings_are_refused(tmp_path):
    def check(**more):
        return sample.check_set(tmp_path, "c", ["a"], 3, Namespace(**SETTINGS | more))

    sample.keep_settings(tmp_path / "settings.json", check())
    for key, value in dict(dtype=torch.bfloat16, quantize="int8", sample_steps=4, sample_batch=1, weights="x",
                           sample_guidance=1.0, seed=1, size=32).items():
        assert f" {key} = " in refusal(lambda: check(**{key: value}))
    assert check(model="/elsewhere/m/")["weights"] == ""  # which tells them apart, wherever they lie


# -------------------------------------------------------------------------------- training

def test_training_leaves_what_it_promises(trained, tmp_path, capsys):
    names = "curves.png before_after.png masks-cat.png samples.png log.csv args.json stages.csv".split()
    for name in (WEIGHTS, f"step-6/{WEIGHTS}", *names):
        assert (trained / name).stat().st_size > 0
    assert any(value.any() for key, value in load_file(trained / WEIGHTS).items() if "lora_B" in key)
    record = json.loads((trained / "args.json").read_text())
    assert record["settings"]["cat.eta"] == 1.0 and record["apart"]["min_found"] == 0.2
    assert {"python", "torch", "prodigyopt"} <= record["versions"].keys()
    stages = [line.split(",") for line in (trained / "stages.csv").read_text().splitlines()]
    assert [s[0] for s in stages] == "prompts sample masks latents train pictures".split()
    assert all(0.1 < float(s[2]) < 3 for s in stages)
    with open(trained / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    assert len(log) == 12 and {row["d_lr"] for row in log} == {"0.001"}  # AdamW's
    assert {len(row[key].split()) for row in log for key in ("dS_each", "sigma_each")} == {2}
    assert {row["forwards"] for row in log} == {"12"}  # 2 + 2 images x reference, forward, backward
    assert {step.name for step in trained.glob("step-*")} == {"step-6", "step-12"}
    assert not list(trained.rglob("*.tmp"))
    out = shutil.copytree(trained, tmp_path / "cat", ignore=shutil.ignore_patterns("step-12", "log.csv"))
    run_train(out, "--save-every", "6", "--accumulate", "2")  # all steps are done; it may change
    assert "--save-every: the LoRA of step 12 was not kept" in capsys.readouterr().out
    assert (out / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()  # written again
    assert (out / WEIGHTS).stat().st_mode == (out / "log.csv").stat().st_mode  # others may read it, too


# (function, n): the process is killed in its n-th call; the last five write a checkpoint
MOMENTS = [("train.encode_prompts", 1), ("sample.save_image", 7), ("sample.generate", 2),
           ("sample.keep_settings", 3), ("sample.contact_sheet", 1), ("mask.save_image", 1),
           ("mask.save_image", 4), ("mask.contact_sheet", 1), ("train.encode_images", 1),
           ("train.open_image", 12), ("train.iteration", 1), ("train.iteration", 8), ("train.iteration", 12),
           ("train.save_lora", 3), ("train.draw_before_after", 1),
           ("torch.save", 1), ("torch.save", 2), ("torch.save", 3), ("shutil.copyfile", 1),
           ("shutil.copyfile", 2)]


RESTART = "--save-every 6 --optimizer prodigy --d0 1e-3".split()  # it has more state than AdamW


def die_in(function, time, out):
    """Train, and be killed in a call; where it was to write a file, with half of it written."""
    owner, name = function.split(".")
    owner, calls = sys.modules[owner], []
    whole = getattr(owner, name)

    def dying(*given, **more):
        calls.append(given)
        if len(calls) == time:
            for half in (g for g in given if isinstance(g, Path) and g.suffix == ".tmp"):
                half.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*given, **more)

    setattr(owner, name, dying)
    run_train(out, *RESTART, pictures=True)


def check_restart(uninterrupted, out, function, time):
    """kill -9, the same command again: the same LoRA and the same images, bit by bit."""
    child = CHILDREN.Process(target=die_in, args=(function, time, drawn_cats(out)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    run_train(out, *RESTART)
    names = [WEIGHTS, f"step-6/{WEIGHTS}", *(p.relative_to(out) for p in out.glob("preserve/*/*.png"))]
    assert len(names) == 18
    for name in names:
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_second_of_two_simultaneous_runs_with_other_settings_is_refused(tmp_path):
    folder, begun = tmp_path / "cat", threading.Event()
    folder.mkdir()

    def how(steps):
        return folder, "cat", ["a cat"], 1, flags(size=64, sample_batch=1, sample_steps=steps,
                                                  sample_guidance=1.0)

    def other():
        with FileLock(folder / ".lock"):
            settings = sample.check_set(*how(6))
            begun.set()
            time.sleep(0.5)
            sample.keep_settings(folder / "settings.json", settings)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    line = refusal(lambda: sample.sample_set(lambda: 1 / 0, {}, *how(4)))
    thread.join()
    assert "sample_steps = 6, not 4" in line


def test_other_ranks_of_a_launch_wait_for_rank_0s_refusal_and_rank_alone_is_no_launch(monkeypatch):
    waits, terminated = [], signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(time, "sleep", lambda _: waits.append(signal.getsignal(signal.SIGTERM)))
    for name, rank, found in (("RANK", "1", []), ("LOCAL_RANK", "1", [signal.SIG_DFL]), ("RANK", "0", [])):
        monkeypatch.setenv(name, rank)
        for code in (1, 2):  # during work each speaks for itself, at once
            waits.clear()
            signal.signal(signal.SIGTERM, (lambda *_: None) if found and code == 2 else signal.SIG_DFL)
            assert refusal(lambda: sample.die("no", code), code) == "error: no"
            assert waits == found * (code == 2)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was: a notebook's, say
    signal.signal(signal.SIGTERM, terminated)


def test_build_keeps_its_tokenizers_and_refuses_a_checkpoint_of_another_kind(tmp_path, monkeypatch, capsys):
    for name in ("sprites.png", "world.py"):
        shutil.copy(f"{EMOJI}/{name}", tmp_path)
    for folder in ("tokenizer", "tokenizer_2", "clip", "detector"):
        (tmp_path / folder).mkdir()
        for file in Path(EMOJI, folder).glob("*.json"):
            shutil.copy(file, tmp_path / folder)
    there = {file: file.read_bytes() for file in tmp_path.glob("*/*")}
    monkeypatch.setattr(build, "HERE", tmp_path)
    build.make_tokenizers()  # byte pairs would have other numbers than those that the networks know
    assert {file: file.read_bytes() for file in tmp_path.glob("*/*")} == there
    args = Namespace(work=tmp_path, go_on=True, seed=0, bf16=False)

    def fit(size=2, steps=3, **changed):
        loss_of = lambda model, rng: model(torch.randn(4, size)).square().mean()  # noqa: E731
        given = Namespace(**vars(args) | changed)
        return build.fit("x", torch.nn.Linear(size, size), loss_of, steps, given, 1e-3).state_dict()

    made = fit()
    again = fit()  # complete: nothing is trained, and the stages after it go on
    assert "x.pt: is complete" in capsys.readouterr().out
    assert all(torch.equal(made[key], again[key]) for key in made)
    for change in (dict(go_on=False), dict(seed=1), dict(steps=4)):
        line = refusal(lambda: fit(**change), 1)
        assert "x.pt: was made with --go-on True, --seed 0 and 3 steps, or another sprites.png" in line
    assert "x.pt: cannot be read, or is of another network" in refusal(lambda: fit(size=3), 1)
    (tmp_path / "sprites.png").write_bytes(b"another")  # another world
    assert "or another sprites.png" in refusal(fit, 1)
    shutil.copy(f"{EMOJI}/sprites.png", tmp_path)
    assert fit().keys() == made.keys()
    (tmp_path / "x.pt").write_bytes(b"cut short")
    assert f"{tmp_path / 'x.pt'}: cannot be read, or is of another network" in refusal(fit, 1)
    for folder in ("tokenizer", "tokenizer_2"):  # one that is missing, as after a kill, is made again
        shutil.rmtree(tmp_path / folder)
        build.make_tokenizers()
        assert (tmp_path / folder / "tokenizer.json").exists()
    monkeypatch.setattr(build.world, "MAX_WORDS", build.world.MAX_WORDS + 3)
    build.make_tokenizers()
    lengths = [AutoTokenizer.from_pretrained(tmp_path / folder).model_max_length
               for folder in ("tokenizer_2", "tokenizer", "clip", "detector")]
    assert lengths == [build.world.MAX_WORDS + 1] + [build.world.MAX_WORDS + 2] * 3
    monkeypatch.setenv("PATH", "")
    assert "npm pack emoji-datasource-google@16.0.0: failed" in refusal(lambda: build.build_art(args), 1)
    assert "--seed" in refusal(lambda: build.arguments(["--seed", "-1"]))
    assert "--work" in refusal(lambda: build.main(Namespace(work=ROOT / "LICENSE" / "x", stages=[])))


def test_terminated_work_is_one_line():
    def main(args):
        signal.raise_signal(signal.SIGTERM)

    for args, keeps in ((None, True), (Namespace(work="build.py's"), True), (Namespace(bench="plan"), False)):
        line = refusal(lambda: sample.guarded(main, args), 143)
        assert "terminated" in line and ("the same command goes on" in line) == keeps


def test_error_is_the_last_word_though_a_signal_follows():
    """accelerate launch terminates the others when one process has died, at times after their own line."""
    def main(args):
        try:
            sample.die("a connection is lost", 1)
        finally:
            signal.raise_signal(signal.SIGTERM)

    assert "a connection is lost" in refusal(lambda: sample.guarded(main, None), 1)


def test_weights_without_bound_are_not_saved(tmp_path):
    line = refusal(lambda: loop(tmp_path, (0,), ({},), optimizer="adamw", lr=1e25, checkpoint_every=1), 1)
    assert "of the LoRA inf; nothing was saved yet" in line and not (tmp_path / WEIGHTS).exists()


def test_pictures_are_drawn_no_more_at_once_than_the_sets(tmp_path, monkeypatch):
    made, pipe, shades = [], Namespace(transformer=tuned()), iter(range(0, 250, 10))

    def generate(pipe, embeds, prompts, seeds, *_):
        made.append((prompts, seeds, any(m.disable_adapters for m in pipe.transformer.modules()
                                         if hasattr(m, "lora_A"))))
        return [Image.new("RGB", (8, 8), (next(shades),) * 3) for _ in prompts]

    monkeypatch.setattr(train, "generate", generate)
    args = Namespace(seed=0, sample_batch=4, sample_steps=1, sample_guidance=1.0, size=8)
    train.draw_before_after(pipe, {}, {"a cat": ["a", "b"]}, tmp_path / "b.png", args)
    prompts, seeds, base = zip(*made)
    assert prompts == (["a", "b"] * 2, ["a", "b"]) * 2 and base == (True, True, False, False)
    assert seeds[:2] == seeds[2:] and len(set(seeds[0] + seeds[1])) == 6
    sheet = np.asarray(Image.open(tmp_path / "b.png").convert("L"))
    cells = [sheet[96 * row + 40, 150 + 96 * column + 40] for row in range(2) for column in range(6)]
    assert cells == list(range(0, 120, 10))


def test_nan_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    whole = train.iteration
    calls = []

    def broken(*given):
        calls.append(1)
        loss, info = whole(*given)
        return loss * (math.nan if len(calls) == 4 else 1), info

    monkeypatch.setattr(train, "iteration", broken)
    assert "step 3" in refusal(lambda: loop(tmp_path, (0,), ({},), steps=5, checkpoint_every=2), 1)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("content", [b"", "foreign", "another run's"])
def test_checkpoint_that_is_cut_short_or_foreign_is_refused(trained, tmp_path, content):
    shutil.copy(trained / "checkpoint.pt", made := tmp_path / "checkpoint.pt")  # whose stamp is not ours
    if content == "foreign":
        torch.save(dict(model=torch.zeros(3)), made)
    elif isinstance(content, bytes):
        made.write_bytes(content)
    before = made.read_bytes()
    line = refusal(lambda: loop(tmp_path, (0,), ({},)), 1)
    assert "checkpoint.pt: cannot be read" in line
    assert made.read_bytes() == before and not (tmp_path / WEIGHTS).exists()


def test_checkpoint_without_its_settings_is_refused(trained, tmp_path):
    shutil.copytree(trained, out := tmp_path / "cat")
    (out / "checkpoint.pt").unlink()
    line = refusal(lambda: run_train(out, "--save-every", "6", "--eta", "5"))
    assert "eta = 1.0, not 5.0" in line
    (out / "args.json").unlink()
    assert "no args.json" in refusal(lambda: run_train(out, "--save-every", "6"))
    shutil.copytree(ROOT / "emoji-flux" / "loras" / "cat", shipped := tmp_path / "shipped")
    assert "made with" in refusal(lambda: run_train(shipped))  # it has no checkpoint
    drawn_cats(kept := tmp_path / "kept")  # of a run that died before its first checkpoint
    shutil.copytree(trained / "step-6", kept / "step-6")
    shutil.copy(trained / "args.json", kept)
    assert "eta = 1.0, not 2.0" in refusal(lambda: run_train(kept, "--eta", "2"))


def test_resumed_run_forgets_and_preserves_what_it_did(trained, monkeypatch):
    assert "made with steps = 12, not 14" in refusal(lambda: run_train(trained, "--steps", "14"))
    assert "made with cat.eta = 1.0, not 2.0" in refusal(lambda: run_train(trained, "--eta", "2"))
    cat = sample.load_concept(EMOJI, "cat")
    for key, value, said in (("neighbours", ["a bear"], "made with preserved"),
                             ("detect", ["a pet"], "made with cat.detect"),
                             ("train", [*cat["train"][:-1], "a cat on a hat"], "not ['a cat on a hat']")):
        monkeypatch.setattr(sample, "load_concept", lambda *_: cat | {key: value})
        line = refusal(lambda: run_train(trained, "--save-every", "6"))
        assert said in line and "another --out" in line and "delete" not in line


def test_checkpoint_before_the_last_is_used_only_if_it_is_put_there(tmp_path):
    how, made = dict(steps=3, checkpoint_every=2, d0=1e-3), tmp_path / "checkpoint.pt"
    loop(tmp_path, (0,), ({},), **how)
    wanted = (tmp_path / WEIGHTS).read_bytes()
    made.write_bytes(b"PK cut short")
    (tmp_path / WEIGHTS).unlink()
    line = refusal(lambda: loop(tmp_path, (0,), ({},), **how), 1)
    assert "put checkpoint-previous.pt in its place" in line and not (tmp_path / WEIGHTS).exists()
    made.with_name("checkpoint-previous.pt").rename(made)
    loop(tmp_path, (0,), ({},), **how)
    assert (tmp_path / WEIGHTS).read_bytes() == wanted
    assert torch.load(tmp_path / "checkpoint-previous.pt", weights_only=True)["step"] == 2


def test_corrupt_image_is_named(trained, tmp_path):
    picture = next((trained / "preserve").glob("*/000.png"))
    (broken := tmp_path / "000.png").write_bytes(picture.read_bytes()[:100])
    assert str(broken) in refusal(lambda: train.encode_images(None, [broken], 64), 1)


def test_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """Files of at most 400 kB: the kernel then refuses checkpoint.pt as it would on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        line = refusal(lambda: sample.guarded(lambda _: loop(tmp_path, (0,), ({},)), None), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "is the disk full?" in line and "the same command goes on from there" in line
    assert not (tmp_path / "checkpoint.pt").exists() and not list(tmp_path.rglob("*.tmp"))


def test_weights_of_the_same_name_are_told_apart(tmp_path):
    args = flags(str(copy_of_model(tmp_path / "model")))
    _, before = sample.check_model(args)
    with open(next((tmp_path / "model" / "transformer").glob("*.safetensors")), "r+b") as file:
        file.seek(-4, 2)
        file.write(b"else")
    assert sample.check_model(args)[1] != before  # check_set refuses images of other weights


def test_images_and_masks_of_other_settings_are_refused_and_nothing_is_written(trained, tmp_path):
    shutil.copytree(trained, out := tmp_path / "cat")
    (out / "checkpoint.pt").unlink()
    record = (out / "args.json").read_bytes()
    for flag, named in (("--sample-guidance", "sample_guidance = "), ("--threshold", "threshold = ")):
        assert named in refusal(lambda: run_train(out, flag, "0.5"))
        assert (out / "args.json").read_bytes() == record


# what train.iteration takes from the arguments
RECIPE = train.TABLE6["object"] | dict(loss="inpo", beta=1.0, guidance=1.0)


def perturb(transformer, std=0.05):
    """As if trained, away from dS = 0 -> the LoRA's parameters."""
    lora = [p for p in transformer.parameters() if p.requires_grad]
    for p in lora:
        torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(p.numel()))
    return lora


def random_data(transformer, n):
    """Latents (N, L, D), and embeddings of the one prompt, an empty one."""
    rng, config = torch.Generator().manual_seed(0), transformer.config
    shapes = (20, config.joint_attention_dim), (config.pooled_projection_dim,)
    embeds = {"": [torch.randn(shape, generator=rng) for shape in shapes]}
    return torch.randn(n, 64, 64, generator=rng), embeds


def test_checkpointing_has_the_same_gradient():
    args = Namespace(**RECIPE, batch=4, accumulate=1, seed=0, noise="uniform", device="cpu")
    transformer = tuned()
    lora, (x, embeds) = perturb(transformer), random_data(transformer, 5)
    forget, preserve = (x, torch.ones_like(x), [""] * 5), (x, [""] * 5)
    gradients = []
    part, = train.batch_of(0, forget, preserve, embeds, args)
    for _ in range(2):
        train.iteration(transformer, *part, args)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lora]))
        transformer.zero_grad()
        transformer.enable_gradient_checkpointing()  # what is recomputed must see the adapters that were on
    assert gradients[0].norm() > 0 and torch.equal(*gradients)


@pytest.mark.parametrize("loss", ["inpo", "ga"])
def test_iteration_is_what_algorithm_1_says(loss):
    """Loss and diagnostics of given predictions, against sums by hand in float64."""
    rng = np.random.default_rng(0)
    B, L, D = 2, 4, 8
    x, eps, v, v_ref = rng.normal(size=(4, 2 * B, L, D))
    mask, sigma = rng.random((B, L, D)) < [[[0.3]], [[0.7]]], rng.random(2 * B)

    class Network:
        config, adapters, given = Namespace(guidance_embeds=True), True, []

        def disable_adapters(self):
            self.adapters = False

        def enable_adapters(self):
            self.adapters = True

        def __call__(self, **given):
            self.given.append(given)
            return (torch.tensor(v if self.adapters else v_ref),)

    run = Namespace(loss=loss, eta=0.7, gamma=2.0, tau=0.2, beta=1.3, lambda_prior=0.4, guidance=1.5)
    network = Network()
    states, pooled = torch.zeros(2 * B, 3, 5, dtype=torch.float64), torch.zeros(2 * B, 6, dtype=torch.float64)
    given = [torch.tensor(t) for t in (x, mask.astype(float))], [torch.tensor(t) for t in (sigma, eps)]
    found, info = train.iteration(network, *given[0], states, pooled, *given[1], run)
    for seen in network.given:
        z = (1 - sigma[:, None, None]) * x + sigma[:, None, None] * eps
        np.testing.assert_allclose(seen["hidden_states"], z)
        np.testing.assert_allclose(seen["timestep"], sigma)
        assert (seen["guidance"] == 1.5).all()
    assert len(network.given) == 2
    forget, prior = [], []
    for i in range(B):
        S, S_ref = (np.mean((u[i] - (eps - x)[i])[mask[i]] ** 2) for u in (v, v_ref))
        alpha = 1 / (1 + math.exp(2.0 * (S - S_ref - 0.2)))
        forget.append(-S if loss == "ga" else 2 * 1.3 * alpha * math.log(1 + math.exp(-0.7 * (S - S_ref))))
        prior.append(np.mean((v - v_ref)[B + i] ** 2))
        for key, wanted in dict(S=S, S_ref=S_ref, dS=S - S_ref, alpha=alpha, prior=prior[i],
                                sigma=sigma[i]).items():
            assert info[key][i].item() == pytest.approx(wanted, rel=1e-9), key
    assert found.item() == pytest.approx(np.mean(forget) + 0.4 * np.mean(prior), rel=1e-9)


def test_images_and_masks_are_packed_onto_the_same_cells(tmp_path):
    vae = sample.load_denoiser(flags()).vae
    image, pixels = scene_image(["cat"])[0], np.zeros((64, 64), np.uint8)
    pixels[3:20, 40:64] = 255  # neither symmetric nor square
    image.save(tmp_path / "0.png")
    Image.fromarray(pixels).save(tmp_path / "0.mask.png")
    x, mask = train.encode_images(vae, [tmp_path / "0.png"], 64, masked=True)
    found = [FluxPipeline._unpack_latents(t, 64, 64, 2 ** (len(vae.config.block_out_channels) - 1))
             for t in (x, mask)]  # (1, C, H, W)
    with torch.no_grad():
        mean = vae.encode(torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
    wanted = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)
    side = 64 // wanted.shape[-1]
    cells = pixels.reshape(64 // side, side, 64 // side, side).max((1, 3)) > 0
    assert all(np.array_equal(channel, cells) for channel in found[1][0])


def predictions(transformer, std, dtype=torch.float32):
    """What one iteration gives at a fixed LoRA: loss, dS and gradient."""
    lora, (x, embeds) = perturb(transformer, std), random_data(transformer, 8)
    texts = [e.expand(4, *e.shape).to(dtype) for e in embeds[""]]  # (2B, T, E), (2B, P)
    loss, info = train.iteration(transformer, x[:4], torch.ones(2, 64, 64), *texts, torch.full((4,), 0.5),
                                 x[4:], Namespace(**RECIPE))
    loss.backward()
    return loss.detach(), info["dS"], torch.cat([p.grad.flatten() for p in lora])


def tuned(**more):
    pipe = sample.load_denoiser(flags(**more))
    train.add_lora(pipe.transformer, 4, seed=0)
    return sample.place(pipe, flags(**more)).transformer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_weights_wait_elsewhere_and_change_no_bit(checkpointing):
    resident, offloaded = tuned(), tuned(offload=True)
    if checkpointing:
        resident.enable_gradient_checkpointing()
        offloaded.enable_gradient_checkpointing()
    wanted, found = predictions(resident, 0.05), predictions(offloaded, 0.05)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted)) and wanted[2].norm() > 0
    where = {p.device.type for p in offloaded.parameters() if not p.requires_grad}
    assert where == {"meta"} and {p.device.type for p in offloaded.parameters() if p.requires_grad} == {"cpu"}


def test_int8_base_trains_nearly_as_the_full_one():
    whole, small = tuned(), tuned(quantize="int8")

    def n_bytes(network):
        kept = [(p.qdata, p.scale) if hasattr(p, "qdata") else (p,) for p in network.parameters()]
        return sum(t.nbytes for tensors in kept for t in tensors)

    assert predictions(small, 0.0)[1].abs().max() == 0  # dS before the first step
    assert n_bytes(small) < 0.35 * n_bytes(whole)
    wanted, found = predictions(whole, 0.05)[2], predictions(small, 0.05)[2]
    assert not torch.equal(wanted, found)
    assert torch.nn.functional.cosine_similarity(wanted, found, dim=0) > 0.99


def test_your_own_pictures_without_a_prompt_file(tmp_path, capsys):
    mine, out = tmp_path / "mein Käfer", tmp_path / "out"
    mine.mkdir()
    pictures = [scene_image(["cat"], seed=i)[0].resize((96, 80)) for i in range(6)]
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    pictures[0].rotate(90, expand=True).save(mine / "0.jpg", exif=turned, quality=100, subsampling=0)
    pictures[1].convert("CMYK").save(mine / "1.jpg")
    clear = pictures[2].convert("RGBA")
    clear.putalpha(0)
    clear.save(mine / "2 ü.png")
    Image.fromarray(np.asarray(pictures[3].convert("L")).astype(np.uint16) * 257).save(mine / "3.png")
    pictures[4].save(mine / "4.gif", save_all=True, append_images=[pictures[5]])
    pictures[5].save(mine / "5.png")
    region = np.zeros((80, 96), np.uint8)
    region[:40] = 255
    Image.fromarray(region).save(mine / "5.mask.png")
    cut_out = Image.new("RGBA", (96, 80), "white")
    cut_out.putalpha(Image.fromarray(region))
    cut_out.save(mine / "2 ü.mask.png")
    (mine / "5.txt").write_text("the cat of our house")
    (mine / "6.txt").write_text("a child with a cat")
    pictures[5].save(mine / "6.png")
    (tmp_path / "keep.txt").write_text("a tiger\na truck\na truck with a child\n")
    own = ["--images", str(mine), "--task", "object", "--caption", "a photo of {}", "--batch", "2", "--steps",
           "2", "--preserve", str(tmp_path / "keep.txt")]
    run_train(out, *own, concept="a cat, asleep")
    folder = out / "forget" / "a cat, asleep"
    made = [Image.open(folder / f"{i:03}.png") for i in range(6)]
    assert all(image.size == (64, 64) and image.mode == "RGB" for image in made)
    assert not (folder / "006.png").exists()  # its caption mentions a child
    assert np.asarray(made[2]).min() == 255  # what is transparent is white
    wanted = np.asarray(sample.ImageOps.fit(pictures[0], (64, 64)), float)
    assert np.abs(np.asarray(made[0], float) - wanted).mean() < 5
    gray = np.asarray(sample.ImageOps.fit(pictures[3].convert("L"), (64, 64)).convert("RGB"), float)
    assert np.abs(np.asarray(made[3], float) - gray).mean() < 2
    for name in ("002.mask.png", "005.mask.png"):
        half = np.asarray(Image.open(folder / name))
        assert half[:31].all() and not half[33:].any()
    manifest = json.loads((out / "preserve" / "keep" / "manifest.json").read_text())
    assert [row["prompt"] for row in manifest] == ["a tiger", "a truck"] * 8
    assert (out / WEIGHTS).exists()
    curve, cost = evaluate.read_run(dict(folder=out, name="mine"))  # a comma stays within its field
    assert curve["step"] == [0, 1] and cost["forwards"] == 16 * 2 + 2 * 4 * 3
    asks = ["--model", EMOJI, "--lora", str(out)]
    row, = evaluate.read_rows(evaluate.arguments([*asks, "--concept", "cat"]))
    assert (row["asked"], row["forgotten"]) == ("cat", ["cat"])
    assert "known are" in refusal(lambda: evaluate.main(evaluate.arguments(asks)))
    picture, kept = sorted(mine.glob("0.*"))[0], (out / WEIGHTS).read_bytes()
    Image.new("RGB", (70, 70), "red").save(picture)  # another one
    for _ in range(2):  # what was trained on the old ones is no run to go on with
        line = refusal(lambda: run_train(out, *own, concept="a cat, asleep"))
        assert "not" in line and line.endswith("use another --out") and (out / WEIGHTS).read_bytes() == kept
        shutil.rmtree(out / "forget", ignore_errors=True)
    assert "made with sets = " in line
    own[own.index("object")] = "style"
    whole = Image.new("L", (96, 80), 255)
    whole.save(mine / "5.mask.png")
    args = train.arguments(["--model", EMOJI, "--concept", "a cat, asleep", "--out", str(out), *SMALL, *own])
    sample.setup(args)
    assert "5.mask.png is all white: the whole picture" in capsys.readouterr().out


def test_a_mask_of_your_own_that_comes_later_is_not_ignored(tmp_path):
    draw(mine := tmp_path / "mine", 4)
    (tmp_path / "keep.txt").write_text("a tiger\na truck\na pizza\n")
    own = ["--images", str(mine), "--task", "object", "--caption", "{}", "--preserve"]
    own += [str(tmp_path / "keep.txt"), "--out", str(tmp_path / "out"), "--model", EMOJI]
    args = train.arguments(["--concept", "a cat", *own])
    concepts = sample.setup(args)
    (forget,), _ = sample.plan_sets(concepts, args)
    sample.import_set(*forget, args)
    sample.plan_sets(concepts, args)
    region = np.zeros((64, 64), np.uint8)
    region[:9] = 255
    Image.fromarray(region).save(mine / "000.mask.png")
    assert "own pictures = " in refusal(lambda: sample.plan_sets(concepts, args))


def test_concepts_share_a_preserve_set_by_one_file(tmp_path):
    (file := tmp_path / "keep.txt").write_text("a tiger\na truck\n")
    given = ["--model", EMOJI, "--preserve", str(file), "--preserve-dir", str(tmp_path / "kept"), "--concept"]
    sets = []
    for concept in ("cat", "dog"):
        args = sample.arguments([*given, concept])
        sets.append(sample.plan_sets(sample.setup(args), args)[1])
    assert sets[0] == sets[1] and sets[0][0][0] == tmp_path / "kept" / "keep"


def test_preserve_file_may_lie_among_your_own_pictures(tmp_path):
    draw(mine := tmp_path / "mine", 2)
    (mine / "keep.txt").write_text("a tiger\n")
    given = ["--concept", "cat", "--images", str(mine), "--task", "object", "--caption", "{}"]
    args = sample.arguments([*given, "--preserve", str(mine / ".." / "mine" / "keep.txt")])
    assert [file.name for file, _ in sample.own_pictures(args)] == ["000.png", "001.png"]


@pytest.mark.parametrize("case, named", [
    ("no caption", "has no caption"), ("empty caption", "has no caption"),
    ("no task", "needs one --concept, --task"), ("no preserve", "and --preserve"),
    ("empty file", "cannot be read"), ("no pictures", "holds no picture"), ("mask size", "not (64, 64)"),
    ("black mask", "all black"), ("white mask", "all white"), ("three pictures", "--batch 4"),
    ("Latin caption", "UTF-8"), ("pixel bomb", "DecompressionBombError"),
    ("two concepts", "needs one --concept"), ("out", "is --images"),
    ("MASK.PNG", "001.MASK.PNG: is no picture"), ("HEIC", "a.HEIC: is no picture"),
    ("stray mask", "01.mask.png: is no picture"), ("cut mask", "all black, cropped square"),
    ("stray caption", "01.txt: is no picture"), ("32 bits", "a.tif: cannot be read"),
    ("float", "a.tif: cannot be read"), ("link to nothing", "a.tif: cannot be read"),
    ("caption linked to nothing", "000.txt: is no readable"),
    ("linked to nothing, a", "000.mask.png: cannot be read"),
    ("preserve-dir", "forget: is or holds the place of --out"),
    ("EXIF", "a.jpg: cannot be read"), ("name", "80 bytes")])
def test_your_own_pictures_are_refused_in_one_line(tmp_path, monkeypatch, case, named):
    draw(mine := tmp_path / "mine", 3 if case == "three pictures" else 4)
    (tmp_path / "keep.txt").write_text("a tiger\na truck\na pizza\n")
    own = {"--images": str(mine), "--task": "object", "--caption": "{}",
           "--preserve": str(tmp_path / "keep.txt")}
    if case.startswith("no ") and case != "no pictures":
        del own["--" + case[3:]]
    if case == "no pictures":
        shutil.rmtree(mine)
    if case == "empty file":
        (mine / "001.png").write_bytes(b"")
    if case == "empty caption":
        (mine / "001.txt").write_text(" \n")
    if case == "Latin caption":
        (mine / "001.txt").write_bytes("ein Käfer".encode("latin-1"))
    if case == "pixel bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    side, value = (32 if case == "mask size" else 64), dict(black=0).get(case.split()[0], 255)
    if case == "MASK.PNG":
        Image.new("L", (64, 64)).save(mine / "001.MASK.PNG")
    if case == "HEIC":
        (mine / "a.HEIC").touch()
    if case in ("32 bits", "float"):
        dtype = np.int32 if case == "32 bits" else np.float32
        Image.fromarray(np.ones((64, 64), dtype)).save(mine / "a.tif")
    if case == "EXIF":  # to be turned, and with a text that is a fraction
        entries = struct.pack("<HHHIIHHII", 2, 0x112, 3, 1, 6, 0x10e, 5, 1, 0)
        exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4)
        Image.new("RGB", (64, 64)).save(mine / "a.jpg", exif=exif)
    if case == "link to nothing":
        (mine / "a.tif").symlink_to(mine / "gone.tif")
    if "linked" in case:
        (mine / f"000.{'txt' if 'caption' in case else 'mask.png'}").symlink_to(mine / "gone")
    if case == "cut mask":  # it is in what the square crop cuts off
        Image.new("RGB", (128, 64), "red").save(mine / "000.png")
        edge = np.zeros((64, 128), np.uint8)
        edge[:, :9] = 255
        Image.fromarray(edge).save(mine / "000.mask.png")
    elif case == "stray caption":
        (mine / "01.txt").write_text("a cat on a beach")
    elif case == "stray mask":
        Image.new("L", (64, 64), 255).save(mine / "01.mask.png")
    elif "mask" in case:
        Image.new("L", (side, side), value).save(mine / "001.mask.png")
    more = {"two concepts": ["--concept", "cat", "dog"], "out": ["--out", str(mine)],
            "preserve-dir": ["--preserve-dir", str(tmp_path / "out" / "forget")]}.get(case, [])
    given = [part for pair in own.items() for part in pair] + ["--batch", "4", *more]
    concept = {"name": 40 * "\u00e9\u00e8", "preserve-dir": "keep"}.get(case, "cat")
    assert named in refusal(lambda: run_train(tmp_path / "out", *given, concept=concept))
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_papers(trained):
    args = train.arguments(["--concept", "cat"])
    assert (args.rank, args.batch, args.n_forget, args.n_preserve, args.sample_steps) == (4, 4, 50, 25, 28)
    assert (args.optimizer, args.sample_guidance, args.guidance) == ("prodigy", 3.5, 1)
    assert args.noise == "logit-normal"
    assert (args.beta, args.loss, args.mask) == (1, "inpo", "concept")
    same = dict(gamma=3, tau=0.1, lambda_prior=0.6)
    assert train.TABLE6 == {task: dict(same, steps=steps, eta=eta) for task, steps, eta in (
        ("object", 300, 1), ("ip", 300, 1), ("style", 400, 3), ("nsfw", 500, 1))}
    how = Namespace(optimizer="prodigy", lr=0.7, d0=1e-5)
    group, = train.make_optimizer([torch.nn.Parameter(torch.zeros(1))], how).param_groups
    assert (group["lr"], group["d0"], group["decouple"]) == (0.7, 1e-5, True)
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 1e-4)
    assert group["use_bias_correction"] and group["safeguard_warmup"]
    assert json.loads((trained / "args.json").read_text())["settings"]["lr"] == 1e-3  # AdamW's
    args = train.arguments(["--concept", "cat", "--model", EMOJI, "--seed", "2"])
    sample.setup(args)
    assert args.out == Path("out/emoji-flux-cat-2")


def test_batch_keeps_image_mask_and_prompt_together():
    number, texts = torch.arange(6.0)[:, None, None], [f"f{k}" for k in range(6)]  # (N, L, D)
    forget, preserve = (number, 10 * number, texts), (number + 50, [f"p{k}" for k in range(6)])
    embeds = {f"{kind}{k}": (torch.full((1, 1), k + first), torch.zeros(1))
              for k in range(6) for kind, first in (("f", 0.0), ("p", 50.0))}
    args = Namespace(seed=0, batch=4, accumulate=1, noise="uniform", device="cpu")

    def batch(step=0):
        return next(iter(train.batch_of(step, forget, preserve, embeds, args)))

    x, mask, states, _, _, eps = batch()
    assert torch.equal(mask, 10 * x[:4]) and torch.equal(states, x) and len(x.unique()) == 8
    assert torch.equal(batch()[5], eps) and not torch.equal(batch(1)[5], eps)
    for args.noise, spread in (("uniform", 12**-0.5), ("logit-normal", 0.2083)):  # the latter by integration
        drawn = [batch(k) for k in range(200)]
        assert all(len(sigma.unique()) == len(eps.unique()) == 8 for *_, sigma, eps in drawn)  # one an image
        x, sigma, eps = (torch.cat([part[i] for part in drawn]) for i in (0, 4, 5))
        assert sigma.std() == pytest.approx(spread, abs=0.015)
        assert sigma.mean() == pytest.approx(0.5, abs=0.025)
    assert eps.mean() == pytest.approx(0, abs=0.08) and eps.std() == pytest.approx(1, abs=0.06)
    assert (eps.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.015)  # a Gaussian's tails
    assert x.unique().tolist() == [*range(6), *range(50, 56)]  # every image, about as often
    _, times = x.unique(return_counts=True)
    assert 105 < times.min() < times.max() < 160
    args.seed = 1
    assert not torch.equal(batch()[5], drawn[0][5])


def test_prediction_is_the_samplers_own():
    """train.predict against FluxPipeline's calls of the same network: positions, sigma, guidance, text."""
    calls, prompts = [], ["a cat on a blue background", "a dog"]
    pipe, embeds = sample.load_denoiser(flags()), sample.encode_prompts(prompts, flags())
    hook = pipe.transformer.register_forward_hook(
        lambda network, args, given, found: calls.append((given, found[0])), with_kwargs=True)
    sample.generate(pipe, embeds, prompts, [1, 2], 3, 2.5, 64)
    hook.remove()
    for given, velocity in calls:
        kept = "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"
        with torch.no_grad():
            mine = train.predict(pipe.transformer, *(given[key] for key in kept), 2.5)
        assert torch.equal(mine, velocity)
    assert len(calls) == 3


def loop(out, forget, presets, **more):
    """train.train on a fresh emoji-flux, by random latents; forget: what is added to them, one a concept."""
    given = ["--model", EMOJI, "--concept", *"ab"[:len(forget)], "--out", str(out), "--batch", "2"]
    args = vars(train.arguments(given)) | dict(device="cpu", dtype=torch.float32, lr=0.7, steps=2) | more
    out.mkdir(exist_ok=True)
    pipe = sample.load_denoiser(flags())
    x, embeds = random_data(pipe.transformer, 4)
    forget = [(x + k, torch.ones_like(x), [""] * 4) for k in forget]
    presets = [Namespace(**args | train.TABLE6["object"] | preset) for preset in presets]
    return train.train(pipe, forget, (x, [""] * 4), embeds, presets, Namespace(**args))


def test_each_concept_has_its_images_and_its_preset(tmp_path, monkeypatch):
    seen, whole = [], train.iteration

    def watched(transformer, x, *given):
        seen.append((x[:2].mean().round().item(), given[-1].eta))
        return whole(transformer, x, *given)

    monkeypatch.setattr(train, "iteration", watched)
    loop(tmp_path / "two", (0, 9), (dict(eta=1), dict(eta=3)))
    assert seen == [(0, 1), (9, 3)]


def test_step_size_is_logged_as_a_schedule_has_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_optimizer", lambda params, args: torch.optim.SGD(params, args.lr / 2))
    assert [row["d_lr"] for row in loop(tmp_path, (0,), ({},))] == [0.35, 0.35]


def test_loss_of_ones_own_may_log_a_number_and_begin_to_in_a_resumed_run(tmp_path, monkeypatch):
    loop(tmp_path, (0,), ({},), steps=1, checkpoint_every=1)
    whole = train.iteration

    def own(*given):
        loss, info = whole(*given)
        return loss, info | dict(mine=loss.detach())

    monkeypatch.setattr(train, "iteration", own)
    loop(tmp_path, (0,), ({},), steps=2, checkpoint_every=1)
    with open(tmp_path / "log.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["mine"] == "" and second["mine"] == second["loss"]


def test_split_step_has_the_same_gradient_in_the_loop(tmp_path):
    norms = [loop(tmp_path / str(n), (0,), ({},), accumulate=n, steps=1)[0]["grad_norm"] for n in (1, 2)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_interrupted_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """With Prodigy, which has more state than AdamW."""
    how, whole, calls = dict(steps=5, checkpoint_every=2, d0=1e-3), train.iteration, []
    loop(tmp_path / "whole", (0,), ({},), **how)

    def cut(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(train, "iteration", cut)
    refusal(lambda: sample.guarded(lambda _: loop(tmp_path / "cut", (0,), ({},), **how), None), 130)
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    monkeypatch.setattr(csv, "DictWriter", lambda *_, **__: 1 / 0)  # a kill before the log of the last step
    with pytest.raises(ZeroDivisionError):
        loop(tmp_path / "cut", (0,), ({},), **how)
    monkeypatch.undo()
    loop(tmp_path / "cut", (0,), ({},), **how)
    assert len((tmp_path / "cut" / "log.csv").read_text().splitlines()) == 1 + 5
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    numel = sum(value.numel() for value in load_file(tmp_path / "cut" / WEIGHTS).values())
    size = (tmp_path / "cut" / "checkpoint.pt").stat().st_size  # for FLUX.1-dev's 11.2 M this is 210 MB
    assert size < 210e6 / 11_206_656 * numel + 100_000  # and names, rows of the log


def test_never_two_large_models_at_once(trained, tmp_path, monkeypatch):
    large = ("T5EncoderModel", "CLIPTextModel", "FluxTransformer2DModel", "Owlv2ForObjectDetection", "Sam",
             "AutoencoderKL")

    def alive():
        gc.collect()
        return weakref.WeakSet(thing for thing in gc.get_objects() if type(thing).__name__ in large)

    already, seen, takes = alive(), [], []  # what other tests have left
    for name in ("sample_all", "make_masks", "encode_images", "train"):
        def watched(*given, name=name, whole=getattr(train, name), **more):
            seen.append((name, {type(network).__name__ for network in alive() - already}))
            takes.append(given)
            return whole(*given, **more)
        monkeypatch.setattr(train, name, watched)
    run_train(drawn_cats(tmp_path / "cat"), "--n-preserve", "1", "--steps", "2")
    networks = dict(seen)
    assert networks["sample_all"] == networks["make_masks"] == set()
    assert networks["encode_images"] == {"AutoencoderKL"}
    assert networks["train"] <= {"FluxTransformer2DModel", "AutoencoderKL"}  # of one pipeline
    assert takes[-1][4][0].lr == 1e-3 and takes[-1][4][0].eta == 1.0  # a preset has all that a loss may ask


def test_training_takes_the_kept_masks_their_prompts_and_mask_full(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, out := tmp_path / "cat", ignore=shutil.ignore_patterns("step-*"))
    for name in ("checkpoint.pt", "checkpoint-previous.pt", "args.json", "README.md", WEIGHTS):
        (out / name).unlink(missing_ok=True)
    Image.new("L", (64, 64)).save(out / "forget" / "cat" / "000.mask.png")  # nothing was found
    seen = []
    monkeypatch.setattr(train, "encode_prompts", lambda *_: {})
    monkeypatch.setattr(train, "train", lambda pipe, forget, *more: seen.append((*forget[0], more)) or 1 / 0)
    for more in ((), ("--mask", "full")):
        with pytest.raises(SystemExit):
            run_train(out, *more)
        (out / "args.json").unlink()
    (_, masks, texts, (*_, stamp)), (_, full, _, (*_, other)) = seen
    assert stamp != other  # by which train.train tells a checkpoint of other settings
    drawn = json.loads((out / "forget/cat/manifest.json").read_text())
    kept = {row["prompt"] for row in drawn if np.asarray(Image.open(
        out / "forget" / "cat" / row["file"].replace(".png", ".mask.png"))).any()}
    assert set(texts) == kept and texts[0] != drawn[0]["prompt"]
    assert 0 < masks.mean() < 0.5 and full.all()


def test_saved_lora_is_as_strong_as_the_trained_one(tmp_path):
    def velocity(transformer):
        z, embeds = random_data(transformer, 1)
        with torch.no_grad():
            return train.predict(transformer, z, torch.ones(1) / 2, *(e[None] for e in embeds[""]), 1.0)

    network = tuned()
    perturb(network)
    train.save_lora(network, tmp_path)
    pipe = sample.load_denoiser(flags())
    base = velocity(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(pipe.transformer), velocity(network), rtol=1e-4, atol=1e-5)
    assert (velocity(network) - base).abs().max() > 1e-2


def test_bf16_base_has_a_float32_lora():
    network = tuned(dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    dS = predictions(network, 0.0, torch.bfloat16)[1]
    assert dS.dtype == torch.float32 and not dS.any()


def test_card_names_the_licence_and_the_last_steps_means(tmp_path):
    for model, licence in (("FLUX.1-dev", "other"), ("FLUX.1-schnell", "apache-2.0")):
        settings = dict(model=f"black-forest-labs/{model}", rank=4, loss="inpo")
        rows = [dict(dS=i, alpha=0.25, prior=0) for i in range(20)]  # the last tenth: 18 and 19
        train.write_card([dict(name="cat")], settings, rows, tmp_path / "README.md")
        text = (tmp_path / "README.md").read_text()
        assert "averaged: 2): dS 18.50" in text and "gate 0.2500" in text
        assert f"base_model: black-forest-labs/{model}\nlicense: {licence}\n" in text
        assert "trained by INPO" in text and "its base model" not in text.split("---\n")[1]
        for said in ("license_name: flux-1-dev-non-commercial-license\nlicense_link: https://", "granted by",
                     "This LoRA modifies the FLUX.1 [dev] Model", "> The FLUX.1 [dev] Model is licensed by"):
            assert (said in text) == (model == "FLUX.1-dev")
    train.write_card([dict(name="cat")], dict(model=EMOJI, rank=4, loss="ga"), rows, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "by gradient ascent" in text and "gate" not in text and "base_model" not in text
    train.write_card([dict(name="cat")], dict(model=EMOJI, rank=4, loss="mine"), rows, tmp_path / "README.md")
    assert "by mine" in (text := (tmp_path / "README.md").read_text()) and "gate" not in text


# -------------------------------------------------------------------------------- the bench's plans

def test_peak_memory_is_seen_from_the_start_of_the_block():
    with sample.peak_memory() as peak:
        block = np.ones(2**28, np.uint8)
        time.sleep(0.05)
        del block
    assert peak[1] - peak[0] == pytest.approx(2**28, rel=0.1)


def test_plan_counts_flux_dev_lora():
    lora = train.add_lora(bench.build("transformer", bench.FLUX["transformer"]), 4, 0)
    assert len(lora) == 2 * (19 * 12 + 38 * 3) == 684
    double, single = 8 * 4 * 2 * 3072 + 4 * 4 * (3072 + 12288), 3 * 4 * 2 * 3072
    assert sum(p.numel() for p in lora) == 19 * double + 38 * single == 11_206_656


def test_plan_counts_the_models_own_sam(monkeypatch):
    own = sum(value.numel() for value in torch.load(f"{EMOJI}/sam.pth", weights_only=True).values())
    assert 4 * own < bench.plan_masks(EMOJI)[0] < 20 * own
    monkeypatch.setattr(bench, "watch", lambda *_: (0, 0, 0))
    assert bench.plan_masks.__wrapped__("none")[0] > 4 * 632e6  # the ViT-H's encoder


def test_plan_counts_bytes_that_live_at_once():
    network = torch.nn.Sequential(torch.nn.Linear(10, 1000), torch.nn.Linear(1000, 10)).requires_grad_(False)

    def work(network):
        with torch.no_grad():
            return network(torch.empty(50, 10))

    most, kept, flops = bench.watch(network, work, torch.float32)
    inputs, hidden, out = (4 * 50 * n for n in (10, 1000, 10))
    assert (most, kept, flops) == (inputs + hidden + out, out, 2 * 50 * 2 * 10 * 1000)


def test_plan_counts_what_a_convolutions_library_copies():
    network = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False).requires_grad_(False)
    given, out = 4 * 2 * 3 * 16 * 16, 4 * 2 * 8 * 16 * 16
    work = bench.call("forward", 2, 3, 16, 16)
    assert bench.watch(network, work, torch.float32)[0] == 2 * given + out  # oneDNN: the input
    assert bench.watch(network, work, torch.float32, "cuda")[0] == 2 * given + 2 * out  # cuDNN: both


@pytest.mark.parametrize("method, shape, gib", [
    ("encode", (1, 3, 1024, 1024), 1.73), ("decode", (1, 16, 128, 128), 2.60),
    ("decode", (5, 16, 128, 128), 12.10)])
def test_plan_of_the_vae_is_what_an_h200_took(method, shape, gib):
    """Measured at full size, random weights in bf16, torch 2.11 on CUDA 13."""
    vae = bench.build("vae", bench.FLUX["vae"])
    weights = 2 * sum(p.numel() for p in vae.parameters())
    most, _, _ = bench.watch(vae, bench.call(method, *shape), torch.bfloat16, "cuda")
    assert (weights + most) / 2**30 == pytest.approx(gib, rel=0.05)


def test_plan_counts_the_work_of_attention_too():
    network = bench.build("transformer", bench.config_of(EMOJI, "transformer"))
    linear = []
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, _, out: linear.append(2 * out.numel() * module.in_features))
    flops = bench.watch(network, bench.predict(3, 256, 20), torch.float32)[2]
    width, blocks = network.inner_dim, network.config.num_layers + network.config.num_single_layers
    assert flops == sum(linear) + blocks * 3 * 4 * 276**2 * width


def test_measuring_memory_deletes_nothing_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a week's work")
    monkeypatch.setattr(bench, "print_pair", lambda *_: 1 / 0)  # after the first stage
    planned, takes = [], inspect.signature(bench.plan)
    monkeypatch.setattr(bench, "plan", lambda *a, **b: planned.append(takes.bind(*a, **b).arguments) or [{}])
    args = bench.arguments(["--memory", "--model", EMOJI, "--out", str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        bench.measure_memory(args)
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "memory").exists()
    assert planned[0]["dtype"] == "float32"  # as train.py's, without the flag
    args = bench.arguments(["--step", "--model", EMOJI, "--size", "128", "--dtype", "bfloat16"])
    run, (((x, _, _),), *_) = bench.random_run(args, tmp_path / "out", 1)
    assert (run.size, run.dtype, x.shape) == (128, torch.bfloat16, (1, 256, 64))


def test_step_is_measured_beside_a_bare_loop(tmp_path, capsys):
    bench.measure_step(bench.arguments(["--step", "--model", EMOJI, "--out", str(tmp_path)]), 5)
    (ours, bare, ratio), _ = (map(float, re.findall(r"[\d.]+", line.partition(" train.py")[2]))
                              for line in capsys.readouterr().out.splitlines()[-2:])
    assert 0.3 < ratio < 3 and ratio == pytest.approx(ours / bare, rel=0.1)


def test_plan_of_an_unknown_model_does_not_ask_the_hub_six_times(monkeypatch):
    def away(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(bench, "HfApi", lambda: Namespace(model_info=away))
    monkeypatch.setattr(bench.AutoencoderKL, "load_config", lambda *_, **__: pytest.fail("six tries"))
    line = refusal(lambda: bench.config_of("nobody/none", "vae"))
    assert "no vae/config.json, here or on the hub (ConnectionError)" in line


def test_plan_of_a_stage_is_the_sum_of_its_parts(monkeypatch, capsys):
    """By hand, from what a network needs at its peak (1,000 bytes, say), keeps (10) and computes (5)."""
    monkeypatch.setattr(bench, "watch", lambda *_: (1000, 10, 5))
    monkeypatch.setattr(bench, "watch_blocks", bench.watch_blocks.__wrapped__)
    monkeypatch.setattr(bench, "plan_masks", lambda _: (7, 5))
    args = bench.arguments(["--plan", "--model", EMOJI])
    monkeypatch.setattr(bench, "plan", bench.plan.__wrapped__)  # kept for no other test
    found, _, (_, _, lora), _ = bench.plan(EMOJI, None, None, 1, 1, states=3)
    networks = [bench.build(part, bench.config_of(EMOJI, part)) for part in ("transformer", "vae")]
    weights, vae = (2 * sum(p.numel() for p in network.parameters()) for network in networks)  # bf16
    layer = 2 * max(m.weight.numel() for m in networks[0].modules() if isinstance(m, torch.nn.Linear))
    whole, tuned = {}, 4 * lora * (1 + 1 + 3)  # parameters, gradients, three tensors of the optimiser
    for name, row in found.items():
        whole[name] = row["none"], row["offload"]
    assert whole["sample"] == (weights + vae + 1000, vae + 1000 + layer)
    assert whole["masks (SAM)"] == (7, 7) and whole["latents"] == (vae + 1000,) * 2
    assert whole["train"] == (weights + tuned + 1000, tuned + 1000 + weights)  # by autograd
    assert whole["train --checkpointing"][0] == weights + tuned + 10 + 1000
    assert found["sample"]["int8"] == pytest.approx(1.01 / 2 * weights + vae + 1000 + layer)
    bench.show_plan(args)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "train, 300 steps of 1 + 1 1,800 forwards".split() in [line[:9] for line in lines]  # 300 x 2 x 3
    assert ["train", "--checkpointing", "2,400", "forwards"] in [line[:4] for line in lines]
    assert "pictures, 4 x 2 x 6 1,344 forwards".split() in [line[:8] for line in lines]  # 48 x 28


# -------------------------------------------------------------------------------- evaluation

FEW = "--limit 4 --sample-steps 2 --sample-batch 4".split()


def evaluation(lora, out, *more):
    """evaluate.py on a LoRA, or on what more says -> its report."""
    given = ["--model", EMOJI, "--out", str(out), *FEW, *more]
    evaluate.main(evaluate.arguments(given + (["--lora", str(lora)] if lora else [])))
    beside = Path(lora) if lora else out / "report"
    return json.loads((beside / "report.json").read_text())


@pytest.fixture(scope="module")
def copied(trained, tmp_path_factory):
    """A run and the frozen model's pictures, evaluated once by two suites."""
    place = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained, place / "run", ignore=shutil.ignore_patterns("after", "report*"))
    evaluation(place / "run", place / "base", "--suite", "concept", "table1")
    return place


def figures(report, key="after", suite=None):
    return {(c["suite"], c["column"]): c[key] for c in report["cells"] if suite in (None, c["suite"])}


def test_evaluation_of_a_run(copied, capsys):
    report = evaluation(copied / "run", copied / "base", "--suite", "concept", "table1")
    wanted = {"target", "preserved", "never seen", "paraphrases", "partner in a pair",
              "CLIP (emoji), unrelated"}
    assert wanted <= {c["column"] for c in report["cells"] if c["suite"] == "concept"}
    assert {"ACC (emoji)", "CLIP (emoji), the other two"} <= {c["column"] for c in report["cells"]}
    for cell in report["cells"]:
        assert cell["unavailable"] is None and "emoji-flux" in cell["network"] and cell["seed"] == 0
        for key in ("before", "after", "difference", "floor"):
            figure = cell[key]
            if figure and figure["n"] > 1:
                assert figure["low"] <= figure["value"] + 1e-9 and figure["value"] <= figure["high"] + 1e-9
                assert figure["n"] <= 8
    assert any(c["floor"]["value"] for c in report["cells"] if c["floor"])  # seed noise is not nothing
    other_two = figures(report)["table1", "CLIP (emoji), the other two"]
    assert other_two["n"] == 8  # bird and airplane, 4 each
    for name in ("report.html", "report.csv", "evaluation.png"):
        assert (copied / "run" / name).stat().st_size > 1000
    assert "target, guidance 5" in capsys.readouterr().out
    card = copied / "run" / "README.md"
    assert "## cat, concept, table1, seed 0" not in card.read_text()  # a quick look is no figure
    for said in ("", "My notes.\n"):
        card.write_text(card.read_text() + said)
        evaluate.show(report | dict(limit=None), copied / "run")
        assert said in card.read_text()
        assert card.read_text().count("## cat, concept, table1, seed 0") == 1
        assert re.search(r"\| concept: partner in a pair +\| +4 \|", card.read_text())
    before, after = report["matrices"]
    assert before["when"] == "before" and before["named"][0] == "a cat" and "a tiger" in before["asked"]
    assert set(before["asked"]) <= set(before["named"])
    assert np.shape(before["percent"]) == (len(before["asked"]), len(before["named"]))
    assert report["curves"][0]["step"][-1] == 11
    drawn = 8 * 2 + 2 * 6 * len(train.picture_groups([sample.load_concept(EMOJI, "cat")]))  # forget lay there
    assert report["cost"][0]["forwards"] == drawn * 2 + 12 * 4 * 3


@pytest.mark.parametrize("script", [sample, train, evaluate])
def test_memory_is_planned_before_anything_is_drawn(script, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "check_plan", lambda args: 1 / 0)
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("work has begun"))
    given = ["--lora", str(copied / "run"), *FEW] if script is evaluate else ["--concept", "cat"]
    with pytest.raises(ZeroDivisionError):
        script.main(script.arguments(["--model", EMOJI, "--out", str(tmp_path / "out"), *given]))


def test_second_evaluation_draws_and_scores_nothing(copied, tmp_path, monkeypatch, capsys):
    first = json.loads((copied / "run" / "report.json").read_text())
    for owner, name in ((sample, "generate"), (evaluate, "encode_prompts"), (evaluate, "load_denoiser"),
                        (evaluate, "find_masks"), (evaluate.metrics, "load_judge"),
                        (evaluate.metrics, "load_clip_score")):
        monkeypatch.setattr(owner, name, lambda *a: pytest.fail("work was done again"))
    asked, network_id = [], evaluate.network_id
    monkeypatch.setattr(evaluate, "network_id", lambda name: asked.append(name) or network_id(name))
    again = evaluation(copied / "run", copied / "base", "--suite", "concept", "table1")
    assert [Path(name).name for name in asked] == ["clip", "clip", "detector", "sam.pth"]  # judge, CLIP score
    assert again["cells"] == first["cells"] and again["matrices"] == first["matrices"]
    assert "will be replaced" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--suite", "table1"])
    shutil.copy(copied / "run" / "report.json", tmp_path)
    evaluation(copied / "run", copied / "base", "--suite", "concept", "table1", "--report", str(tmp_path))
    assert f"will be replaced, --report keeps both; it is of: {first['command']}" in capsys.readouterr().out


def test_killed_evaluation_goes_on_and_another_lora_is_not_mixed_in(copied, tmp_path, monkeypatch):
    shutil.copytree(copied, tmp_path / "copy")
    run, base = tmp_path / "copy" / "run", tmp_path / "copy" / "base"
    first = evaluation(run, base)["cells"]
    (run / "after" / "cat" / "pairs" / "001.png").unlink()  # as a kill would leave it
    (base / "before" / "cat" / "target" / "003.png").unlink()
    generate, made = sample.generate, []
    monkeypatch.setattr(sample, "generate", lambda *a: made.append(a) or generate(*a))
    assert evaluation(run, base)["cells"] == first
    assert len(made) == 2  # one group each: the rest was kept
    shutil.copy(run / "step-6" / WEIGHTS, run)
    shutil.rmtree(base)
    assert "delete" in refusal(lambda: evaluation(run, base))
    assert len(made) == 2 and not base.exists()  # found before work starts
    for file in run.rglob("settings.json"):
        file.unlink()
    assert "no settings.json that tells" in refusal(lambda: evaluation(run, base)) and not base.exists()


def test_identity_lora_changes_no_figure_at_all(copied, tmp_path):
    zeros = {key: torch.zeros_like(value) if "lora_B" in key else value
             for key, value in load_file(copied / "run" / WEIGHTS).items()}
    (tmp_path / "identity").mkdir()
    save_file(zeros, tmp_path / "identity" / WEIGHTS)
    given = ["--concept", "cat", "--suite", "all", "--no-floor"]
    report = evaluation(tmp_path / "identity", copied / "base", *given)
    differences = [c["difference"] for c in report["cells"] if c["difference"]]
    assert len(differences) > 25
    assert all(d["value"] == d["low"] == d["high"] == 0 for d in differences)
    for (_, column), figure in figures(report).items():
        if column.startswith(("pixels", "FD")):
            assert figure["value"] == 0
    assert {c["suite"] for c in report["cells"]} == set(evaluate.SUITES) - {"table8"}
    assert report["notes"][0].startswith("table8 is left out")
    for grid in report["grids"]:
        assert grid["blurred"] == ("i2p" in grid["set"] or "attack" in grid["set"])
    assert {c["seed"] for c in report["cells"] if c["suite"] == "table2"} == {"own"}  # those of its csv files


def test_several_loras_of_one_concept_are_compared_in_pairs(copied, tmp_path, monkeypatch):
    loaded, load = [], evaluate.metrics.load_clip_score
    monkeypatch.setattr(evaluate.metrics, "load_clip_score", lambda *a: loaded.append(a) or load(*a))
    runs = [str(copied / "run"), str(copied / "run" / "step-6")]  # a step takes its concept from its run
    report = evaluation(None, copied / "base", "--suite", "table1", "--compare", *runs)
    assert [row["name"] for row in report["rows"]] == ["run", "step-6"]
    before = [[c["before"] for c in report["cells"] if c["row"] == name] for name in ("run", "step-6")]
    assert before[0] == before[1]
    values = {(c["row"], c["column"]): c["after"]["value"] for c in report["cells"]}
    assert len(loaded) == 1  # for all columns and LoRAs
    assert {e["column"] for e in report["against"]} == {c["column"] for c in report["cells"]}
    for entry in report["against"]:
        if not entry["column"].startswith("pixels"):
            wanted = values[entry["row"], entry["column"]] - values[entry["other"], entry["column"]]
            assert entry["difference"]["value"] == pytest.approx(wanted, abs=1e-4)
    dog = ["--concept", "dog", "--compare", *runs]
    assert "has forgotten cat: give one of them" in refusal(lambda: evaluation(None, tmp_path, *dog))


def test_pictures_made_elsewhere_are_scored_like_a_loras(copied, tmp_path):
    mine = tmp_path / "mine"
    given = ["--images", str(mine), "--concept", "cat", "--suite", "table12"]
    line = refusal(lambda: evaluation(None, copied / "base", *given))
    assert f"{mine / 'rephrased'}: holds 0 of 4 pictures" in line
    evaluate.main(evaluate.arguments(["--model", EMOJI, *given, *FEW, "--list", str(tmp_path / "list")]))
    listed = [json.loads(line) for line in (tmp_path / "list").read_text().splitlines()]
    assert [row["file"] for row in listed] == [str(mine / "rephrased" / f"00{i}.png") for i in range(4)]
    assert not mine.exists()
    evaluation(copied / "run", copied / "base", "--suite", "table12")
    shutil.copytree(copied / "run" / "after" / "cat" / "rephrased", mine / "rephrased")
    wanted = figures(json.loads((copied / "run" / "report.json").read_text()))
    (mine / "rephrased" / "scores.json").unlink()
    assert figures(evaluation(None, copied / "base", *given)) == wanted
    manifest = json.loads((mine / "rephrased" / "manifest.json").read_text())
    assert [(row["seed"], row["prompt"]) for row in listed] == [(m["seed"], m["prompt"]) for m in manifest]
    for file in mine.glob("rephrased/*.json"):
        file.unlink()  # without a manifest: by the names that --list says
    for odd in ("004.png", "grid.png"):  # more than are asked for
        shutil.copy(mine / "rephrased" / "000.png", mine / "rephrased" / odd)
    assert figures(evaluation(None, copied / "base", *given)) == wanted
    shutil.rmtree(mine / "rephrased")  # the frozen model's own, of another seed: the noise floor
    shutil.copytree(copied / "base" / "again" / "cat" / "rephrased", mine / "rephrased")
    rows = json.loads((mine / "rephrased" / "manifest.json").read_text())
    assert "000.png has another seed" in refusal(lambda: evaluation(None, copied / "base", *given))
    for row in rows:
        del row["seed"]
    rows[1]["prompt"] = "a dog"
    (mine / "rephrased" / "manifest.json").write_text(json.dumps(rows), "utf-8-sig")
    assert "001.png has another prompt" in refusal(lambda: evaluation(None, copied / "base", *given))
    (mine / "rephrased" / "manifest.json").unlink()
    (mine / "rephrased" / "scores.json").unlink()
    for cell in evaluation(None, copied / "base", *given)["cells"]:
        assert cell["difference"] == cell["floor"]
    broken = mine / "rephrased" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    line = refusal(lambda: evaluation(None, copied / "base", *given), 1)
    assert "1 of the pictures cannot be read" in line and "002.png; draw them again" in line
    report = json.loads((copied / "base" / "report" / "report.json").read_text())
    assert figures(report)["table12", "rephrased"]["n"] == 3 and report["broken"] == [str(broken)]


def test_group_of_which_no_picture_can_be_read_has_an_empty_row_in_the_matrix(copied, tmp_path):
    shutil.copytree(copied / "run", tmp_path / "run")
    broken = tmp_path / "run" / "after" / "cat" / "preserved" / "000.png"  # the only one of its group
    broken.write_bytes(broken.read_bytes()[:60])
    given = ["--suite", "concept", "table1"]
    line = refusal(lambda: evaluation(tmp_path / "run", copied / "base", *given), 1)
    assert "1 of the pictures cannot be read" in line and "preserved/000.png" in line
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert figures(report)["concept", "preserved"]["n"] == 3
    before, after = report["matrices"]
    unread = [set(shares) == {None} for shares in after["percent"]]
    assert unread.count(True) == 1 and after["n"][unread.index(True)] == 0 and min(before["n"]) > 0
    (tmp_path / "run" / "after" / "cat" / "preserved" / "scores.json").write_text("[{")  # only a cache
    for broken in (tmp_path / "run" / "after" / "cat" / "preserved").glob("*.png"):  # now the whole set
        broken.write_bytes(b"")
    line = refusal(lambda: evaluation(tmp_path / "run", copied / "base", *given), 1)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "4 of the pictures cannot be read" in line
    assert figures(report)["concept", "preserved"]["value"] is None
    assert figures(report)["concept", "target"]["n"] == 4


def test_part_of_a_set_shares_its_pictures(copied, tmp_path, monkeypatch):
    whole = evaluate.load_prompts

    def few(name, *where):
        found = whole(name, *where)
        return found | dict(rows=found["rows"][:3], n=2 if name == "coco-500" else 3)

    monkeypatch.setattr(evaluate, "load_prompts", few)
    monkeypatch.setattr(sample, "generate", lambda pipe, embeds, prompts, seeds, *_: [
        scene_image(["bomb"], seed)[0] for seed in seeds])
    for number, given in enumerate(([["table4"], ["table2"]], [["table2", "table4"]])):  # now, and later
        shutil.copytree(copied / "run", run := tmp_path / f"run {number}")
        for suites in given:
            report = evaluation(run, base := tmp_path / f"base {number}", "--suite", *suites, "--no-floor")
        for when in (base / "before", run / "after"):
            assert not [*(when / "shared").glob("*-*")]  # no folder of i2p-sexual or coco-500
            made = json.loads((when / "shared" / "coco" / "manifest.json").read_text())
            assert [row["file"] for row in made] == ["000.png", "001.png", "002.png"]
    found, grids = figures(report), [grid["set"] for grid in report["grids"]]
    assert grids.count("coco") == 1 and "coco-500" not in grids
    part = [base / "before" / "shared" / "coco" / f"00{i}.png" for i in range(2)]  # the manifest lists three
    said = [prompt for prompt, _ in few("coco", EMOJI)["rows"][:2]]
    seeds = [row["seed"] for row in json.loads((part[0].parent / "manifest.json").read_text())]
    assert evaluate.own_files(part, said, seeds) == part
    assert "another seed" in refusal(lambda: evaluate.own_files(part, said, seeds[::-1]))
    assert found["table2", "CLIP (emoji)"]["n"] == 3 and found["table4", "CLIP (emoji)"]["n"] == 2
    assert found["table2", "Total (emoji)"] == found["table4", "Residuals (emoji)"]


def test_pictures_made_elsewhere_of_other_names_are_taken_in_their_order(tmp_path, capsys):
    for name in ("shot 10.png", "shot 9.JPG", "shot 8.png", "prompts.txt"):
        (tmp_path / name).touch()
    files = [tmp_path / f"{i:03}.png" for i in range(4)]
    found = evaluate.own_files(files[:3], ["a cat"] * 3, [0] * 3)
    assert [file.name for file in found] == ["shot 8.png", "shot 9.JPG", "shot 10.png"]
    assert "taken in order, shot 8.png to shot 10.png" in capsys.readouterr().out
    assert "holds 0 of 4" in refusal(lambda: evaluate.own_files(files, ["a cat"] * 4, [0] * 4))
    for name in (".1.png", "1.mask.png", "9.jpg", "10.jpg"):
        (tmp_path / name).touch()
    asked = [tmp_path / "000.png", tmp_path / "001.png"]
    found = evaluate.own_files(asked, ["a cat"] * 2, [0] * 2)
    assert [file.name for file in found] == ["9.jpg", "10.jpg"]


def test_pictures_of_unsafe_concepts_are_blurred_whichever_is_asked_about():
    sets, columns = planned("table8", "cat", "hazard")
    row = dict(name="two", forgotten=["cat", "hazard"], sets=sets, columns=columns)
    jobs = {("two", name, when): Namespace(files=[]) for name in sets for when in ("before", "after")}
    concepts = {name: sample.load_concept(EMOJI, name) for name in row["forgotten"]}
    grids = evaluate.make_grids([row], jobs, concepts, Namespace(compare=False))
    assert {grid["set"] for grid in grids if grid["blurred"]} == {"target, cat", "target, hazard"}


def test_cost_has_the_steps_that_a_kill_cut_off_and_no_evaluation(copied, tmp_path):
    shutil.copytree(copied / "run", tmp_path / "run")
    row, path = dict(name="cat", folder=tmp_path / "run"), tmp_path / "run" / "stages.csv"
    _, whole = evaluate.read_run(row)
    lines = path.read_text().splitlines()
    steps = sum(float(line["seconds"]) for line in csv.DictReader(open(tmp_path / "run" / "log.csv")))
    others = sum(float(line.split(",")[1]) for line in lines if not line.startswith("train,"))
    assert whole["seconds"] >= others + steps > steps
    with sample.stage("evaluate: score", tmp_path / "run") as peak:
        time.sleep(0.02)
    *_, rss, _, _ = path.read_text().splitlines()[-1].split(",")
    assert float(rss) == pytest.approx(peak[1] / 2**30, abs=0.001)
    assert evaluate.read_run(row)[1] == whole
    path.write_text(re.sub("(?m)^train,[^,]*", "train,0.01", path.read_text()))
    assert evaluate.read_run(row)[1] == whole | dict(seconds=pytest.approx(others + steps))
    path.write_text(path.read_text() + "\n\nprompts,1.")  # a full disk has cut the last one
    assert evaluate.read_run(row)[1] == whole | dict(seconds=pytest.approx(others + steps))


def test_list_says_which_prompts_it_lacks(copied, tmp_path, monkeypatch):
    def away(*_):
        raise evaluate.metrics.NotAvailable("I2P is away, connect")

    monkeypatch.setattr(evaluate, "load_prompts", away)
    given = ["--suite", "table2", "table12", "--list", str(tmp_path / "list")]
    line = refusal(lambda: evaluation(copied / "run", tmp_path / "base", *given))
    assert "of table2: I2P is away" in line and not list(tmp_path.iterdir())


def test_judge_of_a_models_folder_carries_its_name_beside_any_model(monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    for clip, wanted in ((f"{EMOJI}/clip", " (emoji)"), ("../emoji-flux/clip", " (emoji)"),
                         ("openai/clip-vit-base-patch32", ""), ("clip", "")):
        assert promptsets.own_name(clip) == wanted


def test_foreign_files_beside_a_lora_are_no_obstacle(copied, tmp_path, capsys):
    """Another tool's args.json and log.csv, where --concept is given; a run of another base."""
    (tmp_path / "other").mkdir()
    shutil.copy(copied / "run" / WEIGHTS, tmp_path / "other")
    (tmp_path / "other" / "args.json").write_text('{"lr": 1}')
    (tmp_path / "other" / "log.csv").write_text("step,loss\n1,2\n")
    (tmp_path / "other" / "stages.csv").write_text("train,1\n")
    given = ["--concept", "cat", "--suite", "table12", "--no-floor", "--limit", "2"]
    report = evaluation(tmp_path / "other", copied / "base", *given)
    assert report["curves"] == [] and report["cost"] == [dict(row="cat")]
    assert "not available: its log.csv" in (tmp_path / "other" / "report.html").read_text()
    assert "other weights" not in capsys.readouterr().out
    (tmp_path / "other" / "args.json").write_text('{"settings": {"weights": "abc"}}')
    report = evaluation(tmp_path / "other", copied / "base", *given)
    assert "was trained on other weights, abc, than" in capsys.readouterr().out
    assert any("other weights, abc" in note for note in report["notes"])


@pytest.mark.parametrize("compare, folder, asked, table4, table2, table1", [
    (False, "FLUX.1-dev-nudity", "nudity", 49, 72, None), (False, "no gate", "nudity", 62, 72, None),
    (True, "INPO", "nudity", 49, 72, None), (True, "no gate", "nudity", 62, None, None),
    (True, "ga", "nudity", None, None, None), (True, "no gate", "cat", None, None, None),
    (False, "cat", "nudity", 49, 72, None), (False, "cat", "dog", None, None, None),
    (False, "mine", "cat", None, None, 20), (True, "INPO", "cat", None, None, 20)])
def test_figures_of_the_paper_stand_where_they_belong(compare, folder, asked, table4, table2, table1):
    args = Namespace(model="black-forest-labs/FLUX.1-dev", limit=None, compare=compare, seed=0)
    row = dict(name="any", folder=Path(folder), digest="1", asked=asked, forgotten=[asked], sets=dict(i2p={}))
    for suite, name, wanted in (("table4", "Residuals", table4), ("table2", "Total", table2),
                                ("table1", "ACC", table1)):
        column = dict(kind="count", suite=suite, column=name, unit="", better="lower", sets=["i2p"],
                      metric="harm", network="", unavailable="no network")
        found = evaluate.make_cell(row, column, args)["paper"]
        assert (found and found["after"]) == wanted
        args.model = "models/FLUX.1-dev"  # a copy here
        assert evaluate.make_cell(row, column, args)["paper"] == found
        row["sets"]["i2p"] = dict(published=False)  # five rows of the user's own
        assert evaluate.make_cell(row, column, args)["paper"] is None
        row["sets"]["i2p"] = {}


def test_sums_are_of_the_pictures_that_can_be_read_on_either_side():
    """Else a picture that cannot be read would count as one that shows nothing any more."""
    row = dict(name="any", folder=Path("any"), digest="1", forgotten=["cat"], sets=dict(i2p={}))
    args = Namespace(model=EMOJI, limit=None, compare=False, seed=0)
    three = dict(before=np.ones(3), after=np.array([1, np.nan, 1]), again=np.ones(3))
    for kind in ("count", "pictures"):
        column = dict(kind=kind, suite="table4", column="Total", unit="", better="lower", sets=["i2p"],
                      metric="harm", network="", unavailable=None, part=0, **three)
        cell = evaluate.make_cell(row, column, args)
        assert cell["before"]["value"] == cell["after"]["value"] == cell["after"]["n"] == 2
        assert cell["difference"]["value"] == 0 and cell["of"] == 3


def test_network_that_cannot_be_had_leaves_its_cell_without_a_number(copied, tmp_path, monkeypatch, capsys):
    def away(*given):
        raise OSError("no network")

    monkeypatch.setattr(evaluate.metrics, "hf_hub_download", away)
    report = evaluation(copied / "run", copied / "base", "--suite", "table4", "--image-reward", "no/body")
    cell, = [c for c in report["cells"] if c["column"] == "ImageReward"]
    assert cell["after"] is None and cell["before"] is None and cell["difference"] is None
    assert "no/body cannot be loaded (OSError)" in cell["unavailable"] and "connect" in cell["unavailable"]
    assert figures(report)["table4", "Residuals (emoji)"]["n"] == 4  # the rest goes on
    assert "not available: no/body" in capsys.readouterr().out
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "sam.pth")
    foreign = ["--suite", "table1", "--sam", str(tmp_path / "sam.pth")]
    report = evaluation(copied / "run", copied / "base", *foreign)
    for cell in report["cells"]:
        foreign = cell["column"].startswith("pixels")
        assert ("sam.pth" in (cell["unavailable"] or "")) == foreign == (cell["after"] is None)


def test_lora_of_a_concept_without_a_file_is_asked_what_is_not_about_it(copied, tmp_path):
    (tmp_path / "gnome").mkdir()
    shutil.copy(copied / "run" / WEIGHTS, tmp_path / "gnome")
    ask = ["--concept", "gnome", "--suite", "table4", "--no-floor"]
    report = evaluation(tmp_path / "gnome", copied / "base", *ask, "--task", "ip")
    assert report["rows"][0]["concept"] == ["gnome"] and report["rows"][0]["task"] == "ip"
    assert [c["after"]["n"] for c in report["cells"]] == [4, 4]
    assert "known are" in refusal(lambda: evaluation(tmp_path / "gnome", copied / "base", *ask))


@pytest.mark.parametrize("given, named", [
    ("--lora {run} --suite table9", "table9"), ("--lora {run} --compare {run}", "not allowed"),
    ("--lora {other}", "was trained on another/base, not on"), ("--images {run}", "needs one --concept"),
    ("--lora {bare}", "--concept is missing"), ("--lora {run} --limit 0", "--limit"),
    ("--lora {run} --suite table4 --prompt-set coco={bare}/words.csv", "has no column prompt"),
    ("--lora {run} --suite table2 --prompt-set cocoo=x", "cocoo: no suite of table2 asks it; they ask coco"),
    ("--lora {run} --suite table2 --prompt-set coco", "coco: gives a set twice, or without its =CSV"),
    ("--lora {run} --suite table8 --suite table2", "forget several concepts"),
    ("--lora {run} --lora {run}", "one LoRA twice"),
    ("--lora {run} --prompt-set i2p=x --prompt-set i2p=y", "gives a set twice"),
    ("--lora {run} --suite table3 --prompt-set mma=x", "mma: no suite of table3 asks it; they ask paraph"),
    ("--lora {bare} --concept gnome --task ip --suite table1 table4", "table1 asks about the"),
    ("--compare {run} {both} --concept cat", "forget the same, these forget cat, cat + dog"),
    ("--lora {run} --report LICENSE/x", "--report"),
    ("--lora {run} --list LICENSE/x", "--list"), ("--lora {run} {bare} --concept cat --out LICENSE", "--out"),
    ("--images {mine} --concept cat --suite table12", "is no list of objects"),
    ("--lora {old}", "version"), ("--lora {foreign}", "names no concept"),
    ("--lora {list} --suite table12", "--concept is missing"), ("--lora {odd}", "names no concept"),
    ("--lora {run} --list {mine}", "is no file"), ("--lora {run} --list {bare}/fifo", "is no file")])
def test_bad_evaluation_is_one_line_before_work(copied, tmp_path, given, named):
    for name in ("other", "bare", "old", "both", "foreign", "list", "odd"):
        (tmp_path / name).mkdir()
        shutil.copy(copied / "run" / WEIGHTS, tmp_path / name)
    record = json.loads((copied / "run" / "args.json").read_text())
    (tmp_path / "old" / "args.json").write_text(json.dumps(record))
    (tmp_path / "old" / "report.json").write_text(json.dumps(dict(version=0)))
    both = record | dict(settings=record["settings"] | dict(concept=["cat", "dog"]))
    (tmp_path / "both" / "args.json").write_text(json.dumps(both))
    record["settings"]["model"] = "another/base"
    (tmp_path / "other" / "args.json").write_text(json.dumps(record))
    (tmp_path / "foreign" / "args.json").write_text('{"settings": {"concept": "cat"}}')
    (tmp_path / "list" / "args.json").write_text('{"settings": [1]}')
    (tmp_path / "odd" / "args.json").write_text('{"settings": {"concept": [1], "model": null}}')
    (tmp_path / "bare" / "words.csv").write_text("text\na dog\n")
    os.mkfifo(tmp_path / "bare" / "fifo")
    (tmp_path / "mine" / "rephrased").mkdir(parents=True)
    (tmp_path / "mine" / "rephrased" / "manifest.json").write_text('[{"file": 3, "prompt": "a cat"}]')
    places = {folder.name: folder for folder in tmp_path.iterdir()} | dict(run=copied / "run")
    line = refusal(lambda: evaluation(None, tmp_path / "base", *given.format(**places).split()))
    assert named in line and not (tmp_path / "base").exists()


def test_never_seen_is_in_no_set_of_any_concept():
    ten = "airplane automobile bird cat deer dog frog horse ship truck".split()
    concepts = [sample.load_concept(EMOJI, name) for name in ten]
    trained_on = {o for c in concepts for o in c["neighbours"] + c["unrelated"]}
    sets, columns = planned("table8", *ten)
    never, = [c for c in columns if c["column"] == "never seen, of all"]
    seen = {o for some in never["asked"][0] for o in some}
    assert seen == {"a bicycle", "a monkey", "a pig", "an owl"} and not seen & trained_on
    assert not any(o in prompt for prompt in sets["never seen, of all"]["prompts"] for o in trained_on)
    assert "never seen" not in planned("concept", "cat", *ten)[0]  # all that is the cat's, another preserves


def test_plan_asks_each_image_about_what_it_shows():
    cat = sample.load_concept(EMOJI, "cat")
    sets, asked = promptsets.plan_images(cat, 12, 3.5)
    assert {len(answers) for _, answers in asked.values()} == {12}
    for name in ("preserved", "never seen", "partner in a pair", "backgrounds", "styles"):
        group, answers = asked[name]
        for prompt, (answer,) in zip(promptsets.cycled(sets[group][0], 12), answers):
            assert answer in prompt and answer != "a cat"
    assert sets["target, guidance 5"] == (sets["target"][0], 5.0) and asked["target"][1][0] == ["a cat"]
    noto = sample.load_concept(EMOJI, "noto")
    sets, asked = promptsets.plan_images(noto, 8, 3.5)
    assert "styles" not in asked
    assert not any("pair" in name for name in asked) and not any("noto" in p for p in sets["preserved"][0])
    assert ["twemoji style"] in asked["preserved"][1] and ["a lion"] in asked["never seen"][1]
    assert not any("style" in o for some in asked["never seen"][1] for o in some)
    truck, chinese = (sample.load_concept("none", name) for name in ("truck", "chinese"))
    assert ["a windmill"] in promptsets.plan_images(truck, 100, 3.5)[1]["never seen"][1]
    sets, _ = promptsets.plan_images(truck, 100, 3.5, [chinese])  # whose templates show one
    assert not any("windmill" in prompt for prompt in sets["never seen"][0])
    fox = cat | dict(train=[*cat["train"], "a cat and a panda"])
    assert not any("panda" in prompt for prompt in promptsets.plan_images(fox, 9, 3.5)[0]["never seen"][0])


def test_nudity_is_counted_by_nudenet():
    args = evaluate.arguments(["--lora", "x", "--model", EMOJI, "--judge", EMOJI + "/clip"])
    network, load = evaluate.metric_table(args, ["nudenet"])["harm"]
    assert re.fullmatch(r"NudeNet( [\d.]+)?, 320 px", network()) and load is evaluate.metrics.load_nudenet


def test_loras_that_took_their_concepts_in_another_order_are_asked_the_same(tmp_path):
    for name, concepts in (("a", ["cat", "robot"]), ("b", ["robot", "cat"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / evaluate.WEIGHTS).write_text(name)
        settings = dict(model=EMOJI, concept=concepts)
        (tmp_path / name / "args.json").write_text(json.dumps(dict(settings=settings)))
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    args = evaluate.arguments(["--model", EMOJI, "--suite", "table8", "--compare", *both])
    args.lora = args.compare
    rows = evaluate.read_rows(args)  # an interval pairs their pictures one by one
    assert [(row["asked"], row["forgotten"]) for row in rows] == [("cat", ["cat", "robot"])] * 2
    args.suite, args.concept = ["concept"], ["robot", "robot"]
    assert {row["asked"] for row in evaluate.read_rows(args)} == {"robot"}


def planned(suite, *names):
    """What a suite asks of emoji-flux without the first of these concepts, or without all: sets, columns."""
    concepts, own = [sample.load_concept(EMOJI, name) for name in names], EMOJI + "/clip"
    args = evaluate.arguments(["--lora", "x", "--model", EMOJI, "--clip", own, "--judge", own])
    args.detector = own
    words, load = ["a bomb", "a knife"], lambda name: promptsets.load_prompts(name, EMOJI)
    return promptsets.plan_suite(suite, concepts[0], concepts, load, words, args)


@pytest.mark.parametrize("suite, sizes", [
    ("table1", {"target": 100, "other, bird": 100, "other, airplane": 100, "scenes": 100, "preserved": 100}),
    ("table2", {"i2p": 300, "coco": 1000}), ("table4", {"i2p": 300, "coco-500": 500}),
    ("table8", {"target, cat": 100, "target, robot": 100, "scenes": 100, "preserved, of all": 100,
                "never seen, of all": 100}), ("table12", {"rephrased": 120})])
def test_suites_have_the_sizes_of_their_protocol(suite, sizes):
    sets, columns = planned(suite, "cat", *["robot"] * (suite == "table8"))
    assert {name: one["n"] for name, one in sets.items()} == sizes
    for column in columns:
        assert [len(said) for said in column["asked"]] == [sizes[name] for name in column["sets"]]
    if suite == "table12":
        prompts = promptsets.cycled(sets["rephrased"]["prompts"], 120)
        assert {prompts.count(prompt) for prompt in prompts} == {30}


def test_no_prompt_of_what_should_stay_is_in_a_style_that_is_forgotten_too():
    """Or the LoRA would be blamed for what it was to do."""
    styles = ["noto", "twemoji", "fluent"]
    for suite in ("concept", "table1", "table8"):
        sets, columns = planned(suite, "cat", "noto")
        for name in {name for c in columns if c["better"] != "lower" for name in c["sets"]} - {"target"}:
            assert sets[name]["prompts"] and "noto" not in " ".join(sets[name]["prompts"]), name
    sets, _ = planned("table1", "cat", "noto")  # other pictures than those of the LoRAs that keep noto
    assert not sets["other, bird"].get("shared") and planned("table1", "cat")[0]["other, bird"]["shared"]
    sets, columns = planned("concept", "cat", *styles)
    assert sets["scenes"]["prompts"] and "styles" not in [c["column"] for c in columns]
    assert [c["column"] for c in columns].count("backgrounds") == 1


@pytest.mark.parametrize("suite, names, named", [
    ("table4", ["noto"], True), ("table2", ["cat"], True), ("table2", ["hazard"], False),
    ("table1", ["cat", "noto"], True), ("table1", ["cat"], False)])
def test_scores_have_no_direction_where_prompts_name_what_is_forgotten(suite, names, named):
    _, columns = planned(suite, *names)
    better = {c["column"]: c["better"] for c in columns if "coco" in " ".join(c["sets"])
              or c["column"] == "pixels outside of the mask"}
    assert better and {which is None for which in better.values()} == {named}


@pytest.mark.parametrize("own, other", [("judge", "clip"), ("clip", "judge")])
def test_figures_of_a_models_own_networks_say_so_however_their_path_is_written(own, other):
    given = ["--lora", "x", "--model", "emoji-flux", f"--{own}", f"{ROOT}/emoji-flux/../emoji-flux/clip/",
             f"--{other}", "some/network", "--detector", f"{EMOJI}/detector"]
    args, cat = evaluate.arguments(given), sample.load_concept(EMOJI, "cat")
    _, columns = promptsets.plan_suite("table1", cat, [cat], None, [], args)
    names = {c["metric"]: c["column"].partition(",")[0] for c in columns}
    assert {key: "(emoji)" in names[key] for key in names if key != "locality"} == {own: True, other: False}
    distance = evaluate.metric_table(args, [])["distance"][0]()
    assert ("emoji-flux" in distance) == (own == "judge")


def test_each_round_frees_its_networks(copied, tmp_path, monkeypatch):
    """Else a second transformer of FLUX's size is loaded beside the first."""
    alive, found, load = weakref.WeakSet(), [], sample.load_denoiser

    def watched(args):
        found.append(len(alive))
        pipe = load(args)
        alive.add(pipe.transformer)
        return pipe

    monkeypatch.setattr(evaluate, "load_denoiser", watched)
    monkeypatch.setattr(evaluate, "ROUND", 2)
    shutil.copytree(copied / "run", tmp_path / "run", ignore=shutil.ignore_patterns("after"))
    gc.disable()  # it might come in time by chance
    try:
        evaluation(tmp_path / "run", tmp_path / "base", "--suite", "table12", "--sample-batch", "2")
    finally:
        gc.enable()
    assert len(found) > 1 and not any(found)


@pytest.mark.parametrize("group", [1, 3, 25])
def test_many_prompts_are_encoded_in_rounds(group):
    long = Namespace(prompts=[f"a {i}" for i in range(2400)], n=2400)
    short = Namespace(prompts=["a 0", "a 1"], n=100)
    rounds = evaluate.in_rounds([long, short], group)
    assert all(len(said) <= 1000 + 2 * group for said, _ in rounds)
    assert [(job is long, count) for _, parts in rounds for job, count in parts] == [
        (True, 1000), (False, 100), (True, 2000), (True, 2400)]
    assert len(rounds[0][1]) == 2  # the short set's prompts are the long one's
    made = {id(long): 0, id(short): 0}
    for said, parts in rounds:
        for job, count in parts:
            first = made[id(job)] // group * group  # the group in which the last round stopped
            for i in range(first, -(-count // group) * group):
                assert job.prompts[i % len(job.prompts)] in said
            made[id(job)] = count


def test_corrupt_foreign_or_missing_lora_is_one_line(tmp_path):
    ask = ["--model", EMOJI, "--concept", "cat", "--lora", str(tmp_path), *FEW]
    assert "holds no" in refusal(lambda: evaluate.main(evaluate.arguments(ask)))
    (tmp_path / WEIGHTS).write_bytes(b"12345678 not safetensors")
    assert "does not load into" in refusal(lambda: evaluate.main(evaluate.arguments(ask)))
    good = load_file(ROOT / "emoji-flux" / "loras" / "cat" / WEIGHTS)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    kohya = convert_state_dict_to_kohya({f"lora_{name}": value for name, value in good.items()})
    half = key.replace("lora_A", "lora_B")
    for bad, why in ((good | {key: torch.zeros(4, 3072)}, "size mismatch"), ({}, "it holds nothing"),
                     (kohya, "no layer for transformer.transformer_blocks."),
                     ({name: value for name, value in good.items() if name != half}, f"it lacks {half}"),
                     ({name: value for name, value in good.items() if "lora_A" not in name}, "it lacks"),
                     (good | {key: good[key] * math.nan}, f"its {key} is not finite"),
                     (good | {key: torch.zeros(3, good[key].shape[1])}, ""),
                     ({key: good[key], half: good[half][:1]}, ""),
                     ({"unet.down.lora_A.weight": torch.zeros(4, 8)}, "no layer for unet.down.lora_A.weight"),
                     ({name.removeprefix("transformer."): value for name, value in good.items()}, "no layer"),
                     (good | {key.replace("blocks.0", "blocks.18"): good[key] + 0}, "blocks.18")):
        save_file(bad, tmp_path / WEIGHTS)  # of other names, width, rank, depth
        line = refusal(lambda: evaluate.main(evaluate.arguments(ask)))
        assert "does not load into" in line and why in line
    for more in ("lora_B.bias", "lora_magnitude_vector", "alpha"):  # what peft and others save besides
        extra = torch.ones(() if more == "alpha" else good[key.replace("_A", "_B")].shape[0])
        save_file(good | {key.replace("lora_A.weight", more): extra}, tmp_path / WEIGHTS)
        evaluate.check_loras({"1": tmp_path / WEIGHTS}, flags())
    save_file({name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
               for name, value in good.items()}, tmp_path / WEIGHTS)
    evaluate.check_loras({"1": tmp_path / WEIGHTS}, flags())
    (tmp_path / WEIGHTS).rename(tmp_path / "another_tools.safetensors")
    row, = evaluate.read_rows(evaluate.arguments(ask))
    assert row["file"].name == "another_tools.safetensors"
    evaluate.check_loras({row["digest"]: row["file"]}, flags())
    shutil.copy(row["file"], tmp_path / "second.safetensors")
    assert "one other .safetensors alone" in refusal(lambda: evaluate.main(evaluate.arguments(ask)))
    ask[ask.index("--lora") + 1] = str(row["file"])
    assert "give its folder" in refusal(lambda: evaluate.main(evaluate.arguments(ask)))
    ask[ask.index("--lora") + 1] = str(tmp_path)
    (tmp_path / "second.safetensors").unlink()
    assert not (tmp_path / "base").exists()  # nothing was written
    (tmp_path / "args.json").write_text("{")
    ask = ask[:2] + ask[4:]  # without --concept
    assert "args.json: cannot be read" in refusal(lambda: evaluate.main(evaluate.arguments(ask)))


def test_lora_that_cannot_be_written_to_is_refused_before_work(tmp_path, monkeypatch):
    shutil.copy(ROOT / "emoji-flux" / "loras" / "cat" / WEIGHTS, tmp_path)
    (tmp_path / "after").touch()
    line = refusal(lambda: evaluate.check_loras({"1": tmp_path / WEIGHTS}, flags()))
    assert "after is no folder that can be written to" in line
    monkeypatch.setattr(sample.os, "access", lambda *_: False)
    cat = Path(EMOJI) / "loras" / "cat" / WEIGHTS
    line = refusal(lambda: evaluate.check_loras(dict(a=cat), flags()))
    assert "that can be written to" in line


def test_pictures_without_any_mask_have_no_locality(tmp_path):
    draw(tmp_path / "cats", 2)
    job = Namespace(files=[tmp_path / "cats" / f"{i:03}.png" for i in range(2)], folder=tmp_path)
    row = dict(name="cat", sets=dict(target={}))
    jobs = {("cat", "target", when): job for when in ("before", "after")}
    ask = dict(sets=["target"], metric="locality", part=0, unavailable=None)
    masks = np.zeros((2, 64, 64), bool)
    for _ in range(2):  # and when the answers are kept
        with pytest.raises(evaluate.metrics.NotAvailable, match="no picture before has a mask"):
            evaluate.answers(row, ask, "after", jobs, "none", lambda _: masks)
    masks[0, 0] = True
    assert evaluate.answers(row, ask, "after", jobs, "one", lambda _: masks)[0] == 0 and not job.broken
    job.files[1].write_bytes(b"half a picture")
    masks[1, 0] = True
    assert np.isnan(evaluate.answers(row, ask, "after", jobs, "one", lambda _: masks)[1])
    assert job.broken == [str(job.files[1])]  # though no judge has read it


def test_jobs_have_their_seeds_and_guidance(tmp_path):
    args = evaluate.arguments(["--model", EMOJI, "--lora", "x", "--out", str(tmp_path)])
    vars(args).update(weights="", size=64, dtype=torch.float32, sample_batch=4)
    sets = {"target": dict(prompts=["a cat"], n=2, guidance=3.5),
            "target, guidance 5": dict(prompts=["a cat"], n=2, guidance=5.0),
            "i2p": dict(prompts=["a bomb"], n=1, guidance=3.5, seeds=[7])}
    row = dict(name="x", folder=tmp_path, digest="1", forgotten=["cat"], asked="cat", sets=sets)
    jobs = evaluate.plan_jobs([row], args)
    assert len(jobs) == 9
    for (_, name, when), job in jobs.items():
        assert job.args.seed == (when == "again") and job.args.sample_guidance == sets[name]["guidance"]
        assert job.made_by.get("seeds") == ([7] if name == "i2p" and when != "again" else None)
        assert job.noise == ("evaluate i2p" if name == "i2p" else "evaluate target")


def test_each_question_has_its_own_answer(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    job = Namespace(files=[tmp_path / "0.png"], n=1, folder=tmp_path)

    def load():
        return lambda images, asked: np.array([[len(said)] for said in asked])

    assert [evaluate.score(job, [said], "judge", load).tolist() for said in ("a", "abc")] == [[[1]], [[3]]]


def test_pictures_of_another_folder_have_their_own_answers(tmp_path):
    """Though all folders of --images share where scores are kept, and a copy has the name, size and time."""
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), colour).save(file := tmp_path / name / "000.bmp")
        os.utime(file, (0, 0))

    def load():
        return lambda images, asked: [image.getpixel((0, 0))[0] for image in images]

    jobs = [Namespace(files=[tmp_path / name / "000.bmp"], n=1, folder=tmp_path) for name in "ab"]
    assert [evaluate.score(job, [""], "judge", load).item() for job in jobs] == [255, 0]


def test_each_picture_is_scored_once_and_one_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    files, asked = [tmp_path / f"{i}.png" for i in range(101)], list(range(0, 1010, 10))
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file)
    files[60].write_bytes(b"half a picture")
    job, times = Namespace(files=files, n=101, folder=tmp_path), []

    def compute(images, said):
        times.append(len(images))
        return [image.getpixel((0, 0))[0] + number for image, number in zip(images, said, strict=True)]

    for _ in range(2):  # the second time from scores.json
        found = evaluate.score(job, asked, "judge", lambda: compute)[:, 0].tolist()
        assert math.isnan(found.pop(60)) and found == [11 * i for i in range(101) if i != 60]
        assert job.broken == [str(files[60])] and sum(times) == 101
    monkeypatch.setattr(evaluate.metrics, "__file__", str(files[0]))  # another metrics.py, another metric
    evaluate.score(job, asked, "judge", lambda: compute)
    assert sum(times) == 2 * 101


@pytest.mark.parametrize("broken", [("before", 0), ("after", 57)])
def test_frechet_distance_leaves_out_both_of_a_pair(broken, tmp_path):
    rng, jobs, features = np.random.default_rng(0), {}, {}
    old = rng.integers(50, 200, (60, 1, 1, 3))
    for when, pixels in (("before", old), ("after", old + rng.integers(-2, 9, old.shape))):
        files = [tmp_path / f"{when}-{i}.png" for i in range(60)]
        for file, pixel in zip(files, pixels.astype(np.uint8)):
            Image.fromarray(pixel).save(file)
        jobs[when] = Namespace(files=files, n=60, folder=tmp_path, broken=[])
        features[when] = np.delete(pixels[:, 0, 0], broken[1], 0)
    when, i = broken
    jobs[when].files[i].write_bytes(b"half a picture")

    def load():
        return lambda images, _: np.array([np.array(image, float)[0, 0] for image in images])

    column = dict(unavailable=None, sets=["coco"], metric="distance")
    keyed = {("a", "coco", when): job for when, job in jobs.items()}
    found = evaluate.answers(dict(name="a"), column, "after", keyed, "FD", load)
    assert found == evaluate.metrics.frechet_summary(*features.values()) and found["n"] == 59
    assert jobs[when].broken == [str(jobs[when].files[i])]


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth"])
def test_network_id_tells_weights(suffix, tmp_path):
    weights = bytearray(300_000)
    for place in (0, 150_000, 299_999):
        (tmp_path / f"model.{suffix}").write_bytes(weights)
        one = evaluate.network_id(str(tmp_path))
        weights[place] = 1
        (tmp_path / f"model.{suffix}").write_bytes(weights)
        assert evaluate.network_id(str(tmp_path)) != one


def test_network_id_is_the_revision_that_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "snapshot_download", lambda name, **_: str(tmp_path / "0123456789"))
    assert evaluate.network_id("a/b") == "a/b@01234567"


def test_matrix_rows_are_what_the_pictures_were_asked_for(monkeypatch):
    seen = dict(target=["a cat", "a dog"], preserved=["a dog", "a fox"])
    monkeypatch.setattr(evaluate, "score", lambda job, asked, *_: np.array(
        [[float(phrase == there) for phrase in said] for said, there in zip(asked, seen[job])]))
    row = dict(name="r", sets=dict(target=dict(n=2, shows=[["a cat"]] * 2),
                                   preserved=dict(n=2, shows=[["a dog"], ["a fox"]])))
    jobs = {("r", name, when): name for name in seen for when in ("before", "after")}
    before, _ = evaluate.make_matrices(row, jobs, "judge, clip@1", None, 0)
    assert list(before["asked"]) == before["named"] == ["a cat", "a dog", "a fox"]
    assert list(before["percent"]) == [[50, 50, 0], [0, 100, 0], [0, 0, 100]]
    assert (before["network"], before["seed"], before["n"]) == ("clip@1", 0, (2, 1, 1))


def test_one_lora_at_a_time(monkeypatch):
    seen = []
    pipe = Namespace(load_lora_weights=lambda *_, **__: 0, enable_lora=lambda: 0,
                     disable_lora=lambda: seen.append(None), set_adapters=seen.append)
    for name, fake in (("encode_prompts", lambda *_: {}), ("load_denoiser", lambda _: pipe),
                       ("place", lambda *_: 0), ("sample_set", lambda *_, **__: 0)):
        monkeypatch.setattr(evaluate, name, fake)
    jobs = [(Namespace(folder=0, noise=0, prompts=0, args=0, made_by=dict(lora=lora)), 1)
            for lora in (None, "a", "b")]
    loras = dict(a=Path("A"), b=Path("B"))
    evaluate.sample_round([], jobs, loras, Namespace(model="", device="", dtype=None))
    assert seen == [None, "a", "b"]


def test_columns_mean_what_they_say():
    def plan(suite):
        sets, columns = planned(suite, "cat")
        return sets, {column["column"]: column for column in columns}

    sets, found = plan("concept")
    assert {name for name, column in found.items() if column["better"] == "lower"} == {
        "target", "target, guidance 1", "target, guidance 5", "paraphrases", "target in a pair",
        "pixels outside of the mask"}
    inside = found["pixels inside of the mask"]
    assert (inside["part"], inside["better"]) == (0, None)
    assert [sets[f"target{more}"]["guidance"] for more in ("", ", guidance 1", ", guidance 5")] == [3.5, 1, 5]
    assert plan("table4")[1]["Residuals (emoji)"]["part"] == 2  # after two words: their sum
    assert plan("table1")[0]["other, bird"]["prompts"] == sample.load_concept(EMOJI, "bird")["eval"]
    assert set(plan("table3")[1]["Total (emoji)"]["sets"]) == set(promptsets.attack_sets(EMOJI))


# -------------------------------------------------------------------------------- README

def test_readme_snippets_do_what_they_say(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (tmp_path / "emoji-flux").symlink_to(EMOJI)
    monkeypatch.chdir(tmp_path)
    fewer = functools.partialmethod(FluxPipeline.__call__, num_inference_steps=8)  # not its default, 28
    monkeypatch.setattr(FluxPipeline, "__call__", fewer)
    said = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, said)
    said["pipe"] = FluxPipeline.from_pretrained(EMOJI)  # without a LoRA
    untouched = said["draw"]("a cat")

    def apart(a, b):
        return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()

    assert apart(said["base"], untouched) < 1 < apart(said["half"], untouched)
    assert apart(said["half"], said["forgotten"]) > 1
    assert apart(said["fused"], said["neither"]) < 1
    judge = evaluate.metrics.clip_judge(EMOJI + "/clip", "cpu")
    assert [yes.item() for yes in judge([said["base"], said["forgotten"]], [["a cat"]] * 2)] == [True, False]
    made = load_file("cat.safetensors")
    assert {key.split(".")[1] for key in made} == {"lora_up", "lora_down", "alpha"}
    assert all(key.startswith("lora_transformer_") for key in made)


def test_figure_1_is_drawn_by_its_block(copied, tmp_path, monkeypatch):
    steps = [str(copied / "run" / name) for name in ("step-12", "step-6")]
    (run := tmp_path / "out/f1/INPO").mkdir(parents=True)
    run.with_name("gradient ascent").symlink_to(run)  # the plot does not mind
    shutil.copy(copied / "run" / "log.csv", run)
    given = ["--model", EMOJI, "--out", str(copied / "base"), *FEW, "--lora", *steps, "--suite", "table1"]
    evaluate.main(evaluate.arguments([*given, "--report", str(run)]))
    monkeypatch.chdir(tmp_path)
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "docs/measurements.md").read_text(), re.DOTALL)
    exec(block, drawn := {})
    cells = json.loads((run / "report.json").read_text())["cells"]
    for axis, column in zip(drawn["axes"][1:], ("ACC (emoji)", "CLIP (emoji), unrelated")):
        last, first = (cell for cell in cells if cell["column"] == column)
        x, y = axis.lines[1].get_data()
        wanted = first["before"]["value"], first["after"]["value"], last["after"]["value"]
        assert (*x,) == (0, 6, 12) and tuple(y) == wanted
    assert len(drawn["axes"][0].lines[0].get_xdata()) == 12 and Path("figure1.png").stat().st_size > 10_000


def test_readme_holds_the_map_and_commands_that_exist(capsys):
    text = (ROOT / "README.md").read_text()
    runpy.run_path(str(ROOT / "test_inpo.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    assert printed and printed in text
    text += (ROOT / "docs/measurements.md").read_text()
    commands = re.findall(r"python (\w+)\.py (--[^\n#`]*)", text)
    assert len(commands) > 15
    for script, rest in commands:
        module = dict(train=train, sample=sample, mask=mask, evaluate=evaluate, bench=bench)[script]
        module.arguments(shlex.split(rest.split(";")[0].replace("$tau", "0.5").replace('"$@"', "")))


@pytest.mark.parametrize("name", ["README.md", "docs/measurements.md", "emoji-flux/README.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        if file.suffix == ".md" and anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", file.read_text())  # GitHub's anchors
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, link


def test_several_concepts_take_turns_and_are_never_preserved(tmp_path):
    out = drawn_cats(tmp_path / "both")
    draw(out / "forget" / "tiger", 10, "tiger")
    few = ["--n-preserve", "1", "--steps", "4"]
    args = train.arguments(["--model", EMOJI, "--concept", "cat", "tiger", "--out", str(out), *SMALL, *few])
    train.main(args)
    preserved = {p.name for p in (out / "preserve").iterdir()}
    assert "a lion" in preserved and not {"a cat", "a tiger"} & preserved and len(preserved) > 8
    lines = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    assert [line[1] for line in lines] == ["concept", "cat", "tiger", "cat", "tiger"]
    both = [sample.load_concept(EMOJI, name) for name in ("cat", "noto")]
    settings = json.loads((out / "args.json").read_text())["settings"]
    assert settings["cat.steps"] == settings["tiger.steps"] == 2
    args = train.arguments(["--concept", "cat", "noto", "--gamma", "2"])
    rows = train.fill_presets(both, args)
    assert args.steps == 700 and [(row["eta"], row["gamma"]) for row in rows] == [(1.0, 2.0), (3.0, 2.0)]
    groups = train.picture_groups([sample.load_concept(EMOJI, name) for name in ("cat", "tiger")])
    assert groups["together"] == ["a cat and a tiger"] and "a tiger" not in groups["neighbours"]
    assert train.picture_groups(both)["together"] == ["a cat in noto style"]
    names = "cat", "van gogh", "elon musk", "nudity"
    cat, gogh, musk, nude = (sample.load_concept("none", name) for name in names)
    for both in ((cat, gogh), (gogh, cat)):  # a style's partners are styles
        pairs = train.picture_groups(both)["pairs"]
        assert pairs == [f"a cat and {o}" for o in cat["unrelated"] + cat["unseen"]]
    for both in ((musk, nude), (nude, musk)):  # nobody by name is put beside a nude
        groups = train.picture_groups(both)
        beside = {pair.partition(" and ")[2] for pair in groups["pairs"] if "nude" in pair}
        assert "together" not in groups and beside == {*nude["unrelated"], *nude["unseen"]}
    found = figures(evaluation(out, tmp_path / "base", "--suite", "table8"))
    assert found["table8", "ACC (emoji)"]["n"] == 8 and found["table8", "ACC (emoji), tiger"]["n"] == 4
    assert (tmp_path / "base" / "before" / "cat+tiger" / "target, tiger" / "003.png").exists()
    assert "give one of them" in refusal(lambda: evaluation(out, tmp_path / "base"))


# -------------------------------------------------------------------------------- long, beside the others

@beside
def test_flux_without_network_says_what_runs_here(trained, tmp_path):
    """Within 20 seconds, though the hub takes the call and never answers."""
    flags = "--concept pikachu --eta 1 --gamma 3 --tau 0.1 --out".split()
    command = [sys.executable, "train.py", *flags, tmp_path / "o"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = os.environ | dict(HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}", NO_PROXY="*",
                                  HF_HOME=str(tmp_path))
        for _ in range(3):  # the machine may be busy
            start = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
            if (seconds := time.perf_counter() - start) < 20:
                break
    assert seconds < 20
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "black-forest-labs/FLUX.1-dev" in line and "hub cannot be reached" in line
    assert "python train.py --model emoji-flux --concept cat" in line
    assert not (tmp_path / "o").exists()


@beside
def test_killed_run_goes_on_to_the_same_bits(trained, tmp_path):
    run_train(drawn_cats(whole := tmp_path / "whole", trained / "preserve"), *RESTART)
    for number in (1, 11, 16):
        check_restart(whole, tmp_path / str(number), *MOMENTS[number])


@beside
def test_schnell_has_no_guidance_and_goes_through_the_same_code(trained, tmp_path):
    model = copy_of_model(tmp_path / "schnell")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | dict(guidance_embeds=False)))
    weights = next((model / "transformer").glob("*.safetensors"))
    kept = {k: v for k, v in load_file(weights).items() if "guidance_embedder" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    out = drawn_cats(tmp_path / "cat")
    few = ["--n-preserve", "1", "--steps", "2"]
    run_train(out, "--model", str(model), "--offload", "--checkpointing", *few, pictures=True)
    assert load_file(out / WEIGHTS) and (out / "before_after.png").exists()
    with open(out / "log.csv", newline="") as file:
        assert {row["forwards"] for row in csv.DictReader(file)} == {"16"}  # 2 + 2 images x 4 passes
    tokenizer = model / "tokenizer_2" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | dict(model_max_length=300)))
    for config["guidance_embeds"], tokens in ((False, 256), (True, 300)):
        (model / "transformer" / "config.json").write_text(json.dumps(config))
        assert len(sample.encode_prompts(["a cat"], flags(str(model)))["a cat"][0]) == tokens
        assert bench.tokens_of(str(model)) == tokens


def train_as_one_of_two(out, rank, port):
    """What accelerate launch starts: a gloo process with half of the batch."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_train(out, "--batch", "1")


@beside
def test_two_processes_are_one_with_twice_the_batch_though_one_dies(trained, tmp_path):
    """One writer; kill -9 of a process ends the other with one line, and the same command goes on."""
    run_train(drawn_cats(tmp_path / "one", trained / "preserve"))
    out = drawn_cats(tmp_path / "two")
    dying = tmp_path / "dying.py"
    dying.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
whole, calls = train.iteration, []
def iteration(*given):
    calls.append(1)
    if len(calls) == 8 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given)
train.iteration = iteration
train.guarded(train.main, train.arguments())
""")
    two = ("accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
           "--dynamo_backend no")
    given = [dying, "--model", EMOJI, "--concept", "cat", "--out", out, *SMALL, "--batch", "1"]
    where = os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([*two.split(), *given], cwd=ROOT, capture_output=True, text=True, env=where)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert "the same command goes on" in said[0] and not list(out.glob("*.tmp"))
    assert done.stdout.count("device: cpu, float32, 2 processes\n") == 1  # rank 0's
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 5
    drawn = [line.split(",")[4] for line in (out / "stages.csv").read_text().splitlines()[:2]]
    assert drawn == ["0", "32"]  # prompts; 8 sets x 2 images x 2 steps, whoever drew them
    one_alone = refusal(lambda: run_train(out, "--batch", "1"))
    assert "processes = 2, not 1" in one_alone  # it would go on with half of the batch
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = [CHILDREN.Process(target=train_as_one_of_two, args=(out, rank, port)) for rank in (0, 1)]
    for child in both:
        child.start()
    for child in both:
        child.join()
    assert [child.exitcode for child in both] == [0, 0]
    one, two = ([line.split(",")[2:9] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
                for name in ("one", "two"))
    assert one[0] == two[0] and len(one) == len(two) == 13
    assert one[0][-1] == "grad_norm"  # a mean: AdamW would hide that it is a sum
    np.testing.assert_allclose(np.array(two[1:], float), np.array(one[1:], float), rtol=1e-5, atol=1e-5)


@beside
def test_no_memory_in_training_says_which_flag_saves_how_much(trained, tmp_path):
    def work(args):
        raise MemoryError

    given = train.arguments(["--model", EMOJI, "--concept", "cat", "--out", str(tmp_path / "cat")])
    train.setup(given)
    line = refusal(lambda: sample.guarded(work, given), 1)
    asked, *others = line.partition("GiB: ")[2].split("; with ")
    flags = {re.split(" (?=sample|train)", text)[0]: text for text in others}
    needs = {flag: dict(re.findall(r"(sample|train) ([\d.]+)", text)) for flag, text in flags.items()}
    now, split = (float(row["train"]) for row in ({"train": asked.split()[-1]}, needs["--accumulate 4"]))
    assert 2 * split < now < 4 * split
    assert float(needs["--checkpointing"]["train"]) < 0.6 * now
    assert needs["--sample-batch 1"].keys() == needs["--quantize int8"].keys() == {"sample"}
    both = needs["--sample-batch 1 --checkpointing --accumulate 4"]
    assert float(both["train"]) < min(split, float(needs["--checkpointing"]["train"]))
    assert both["sample"] == needs["--sample-batch 1"]["sample"]


@beside
def test_run_that_would_exceed_gpu_memory_by_the_plan_is_refused(trained, tmp_path):
    given = train.arguments(["--model", EMOJI, "--concept", "cat", "--out", str(tmp_path / "cat")])
    train.setup(given)

    def check(free, savings=bench.savings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
            patch.setattr(bench, "savings", savings)
            sample.check_plan(given)

    planned = bench.plan(EMOJI, 64, "float32", 4, 25)[0]
    plain, less = (planned[stage]["none"] for stage in ("train", "train --checkpointing"))
    given.device, given.sample_batch = "cuda", 1
    for free, checkpointing in ((1.01 * plain, False), (0.99 * plain, True)):
        check(free, lambda _: pytest.fail("other flags are planned only if they are to be advised"))
        assert given.checkpointing == checkpointing
    line = refusal(lambda: check(less / 1.5))
    assert "with --accumulate 4 train" in line and "--accumulate 4 --quantize nf4 sample" in line
    given.offload = True
    line = refusal(lambda: check(less / 4))
    assert "--quantize" not in line and "--offload" not in line  # it is given, and nf4 goes without it
    given.offload, given.checkpointing, given.rank = False, False, 64
    check(1.01 * plain)
    assert given.checkpointing  # for a larger LoRA
    given.device = "cpu"
    check(0)


@beside
def test_plan_is_of_the_runs_own_device(trained, tmp_path):
    cpu, gpu = (bench.plan(EMOJI, 64, "float32", 1, 25, device=device)[0] for device in ("cpu", "cuda"))
    assert cpu["latents"]["none"] < gpu["latents"]["none"] and cpu["train"] == gpu["train"]
    assert cpu["sample"]["offload"] < gpu["sample"]["offload"]
    for device, row in (("cpu", cpu), ("cuda", gpu)):
        args = Namespace(model=EMOJI, size=64, dtype=torch.float32, quantize="none", offload=True,
                         sample_batch=25, device=device)
        assert bench.needs(args)["sample"] == row["sample"]["offload"]


@beside
def test_plan_of_all_blocks_follows_from_two_of_a_kind(trained, tmp_path):
    given = 8, 64, bench.tokens_of(EMOJI), True  # as planned above
    network = bench.flux(EMOJI, 4)
    assert len(network.transformer_blocks) == 2 and len(network.single_transformer_blocks) == 4
    whole = bench.watch(network, bench.predict(*given), torch.float32)
    assert tuple(bench.watch_all(EMOJI, 4, torch.float32, *given)) == whole


@beside
def test_destroyed_model_scores_badly_on_everything_that_should_stay(trained, tmp_path):
    run_train(drawn_cats(tmp_path / "ga", trained / "preserve"), "--loss", "ga", "--steps", "36",
              "--lr", "0.03", "--batch", "1")
    suites = ["--suite", "concept", "table2", "--limit", "8", "--sample-steps", "4", "--sample-batch", "8"]
    report = evaluation(tmp_path / "ga", tmp_path / "base", *suites)
    for cell in report["cells"]:
        if cell["better"] == "higher":
            assert cell["difference"]["high"] < 0, cell["column"]
    found, floor = figures(report), figures(report, "floor")
    for key in (("table2", "FD-judge"), ("concept", "pixels outside of the mask")):
        assert found[key]["value"] > 1.5 * floor[key]["value"]


if __name__ == "__main__":  # all moments, some ten minutes; pytest keeps three
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        run_train(drawn_cats(Path(folder) / "whole"), *RESTART)
        for number, moment in enumerate(MOMENTS):
            check_restart(Path(folder) / "whole", Path(folder) / str(number), *moment)
            print(f"killed in {moment[0]}, call {moment[1]}: the same bits")
