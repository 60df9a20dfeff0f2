"""The concept masks M of section 3.2: where in each forget image the concept is.

    python mask.py --model emoji-flux --concept cat    # after sample.py; out/emoji-flux-cat/masks-cat.png

Words -> boxes by an open-vocabulary detector -> SAM -> the union of all instances. Styles and nsfw concepts
go without SAM: their masks are the boxes, filled. A style's is the whole framed picture (C.1), or what else
its file's `detect:` names; nudity's are NudeNet's. An image in which nothing is found is dropped and counted,
it is never trained on with an empty or full mask.
"""
import shlex
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

from sample import (check_settings, contact_sheet, die, guarded, has_vocabulary, keep_settings, load_whole,
                    lock, mask_flags, model_flags, open_image, save_image, setup)

def arguments(given=None):
    parser = model_flags(__doc__)
    mask_flags(parser.add_argument)
    return parser.parse_args(given)

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from PIL import Image  # noqa: E402
from segment_anything import SamPredictor  # noqa: E402
from segment_anything.modeling import (ImageEncoderViT, MaskDecoder, PromptEncoder, Sam,  # noqa: E402
                                       TwoWayTransformer)
from torchvision.ops import nms  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING, AutoConfig,  # noqa: E402
                          AutoModelForZeroShotObjectDetection, AutoProcessor)

def build_sam(img_size, patch, width, depth, heads, global_blocks, window, decoder_width, decoder_mlp):
    """A Sam of any size; sam_model_registry builds the three published ones only."""
    grid = img_size // patch
    return Sam(
        ImageEncoderViT(img_size=img_size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
                        global_attn_indexes=global_blocks, window_size=window, out_chans=decoder_width,
                        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True),
        PromptEncoder(embed_dim=decoder_width, image_embedding_size=(grid, grid), mask_in_chans=16,
                      input_image_size=(img_size, img_size)),
        MaskDecoder(num_multimask_outputs=3, transformer_dim=decoder_width, iou_head_hidden_dim=decoder_width,
                    transformer=TwoWayTransformer(2, decoder_width, num_heads=8, mlp_dim=decoder_mlp)),
        pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375])

def load_sam(weights):
    """SAM from a state dict, its architecture read off the shapes: ViT-B, L, H or emoji-flux's own."""
    _, grid, _, width = weights["image_encoder.pos_embed"].shape
    patch = weights["image_encoder.patch_embed.proj.weight"].shape[-1]
    depth = sum(k.endswith("attn.rel_pos_h") for k in weights)
    positions = [weights[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in range(depth)]  # (2 span - 1, D)
    spans = [(len(p) + 1) // 2 for p in positions]
    window = min(spans) if min(spans) < grid else 0  # a span is the grid or the window; 0: no windows
    sam = build_sam(grid * patch, patch, width, depth, heads=width // positions[0].shape[1],
                    global_blocks=[i for i, s in enumerate(spans) if s == grid], window=window,
                    decoder_width=len(weights["image_encoder.neck.0.weight"]),
                    decoder_mlp=len(weights["mask_decoder.transformer.layers.0.mlp.lin1.weight"]))
    sam.load_state_dict(weights)
    return sam.eval()

def load_detector(name, device):
    """-> find(PIL image, words, threshold) -> boxes, float (N, 4): x0, y0, x1, y1 in pixels, all instances
    of any of the words."""
    try:
        model = load_whole(AutoModelForZeroShotObjectDetection, name, dtype=torch.float32)
        processor, config = AutoProcessor.from_pretrained(name), model.to(device).eval().config
    except (OSError, ValueError) as error:
        raise OSError(f"--detector {name}: cannot be loaded: {error}") from error
    # GroundingDINO reads less than its text encoder could
    longest = getattr(config, "max_text_len", config.text_config.max_position_embeddings)

    @torch.no_grad()
    def find(image, words, threshold):
        inputs = processor(text=[words], images=image, return_tensors="pt").to(device)
        if inputs.input_ids.shape[1] > longest:
            raise OSError(f"{' / '.join(words)}: too long for --detector {name}: shorten it")
        outputs = model(**inputs)
        found = processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=[image.size[::-1]])[0]
        kept = nms(found["boxes"], found["scores"], 0.5)  # many patches find one thing: the best stays
        return found["boxes"][kept].cpu().numpy()
    return find

def load_nudenet():
    """The same find() by NudeNet's *_EXPOSED classes, at 640 px, where it finds small people, too."""
    from nudenet import NudeDetector  # AGPL-3.0: an optional extra, whose absence setup() refuses
    detector = NudeDetector(inference_resolution=640)

    def find(image, _, threshold):
        found = detector.detect(np.asarray(image)[..., ::-1].copy())  # BGR, as it would read a file
        boxes = [d["box"] for d in found if d["class"].endswith("_EXPOSED") and d["score"] >= threshold]
        return np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], float).reshape(-1, 4)
    return find

def enclose(boxes):
    """Boxes (N, 4) -> (M, 4): wherever some overlap, the one rectangle around them."""
    apart = []
    for box in boxes:
        while hits := [i for i, o in enumerate(apart) if (box[:2] < o[2:]).all() and (o[:2] < box[2:]).all()]:
            other = apart.pop(hits[0])
            box = np.concatenate([np.minimum(box, other)[:2], np.maximum(box, other)[2:]])
        apart.append(box)
    return np.array(apart).reshape(-1, 4)

def find_masks(images, concept, args):
    """Yield each PIL image's mask, bool (H, W); all False where nothing was found."""
    words = concept["detect"]
    find = load_nudenet() if words == ["nudenet"] else load_detector(args.detector, args.device)
    boxes = [find(image, words, args.threshold) for image in tqdm(images, desc="detect")]
    del find  # before SAM: never two large models at once
    if concept["task"] == "style":  # a frame and the picture in it become one rectangle
        boxes = [enclose(found) for found in boxes]
    if concept["task"] not in ("object", "ip"):  # filled rectangles
        for found, image in zip(boxes, images):
            mask = np.zeros(image.size[::-1], bool)
            for x0, y0, x1, y1 in found.round().astype(int).clip(0):
                mask[y0:y1, x0:x1] = True
            yield mask
        return
    load = torch.hub.load_state_dict_from_url if "://" in args.sam else torch.load
    try:
        sam = load_sam(load(args.sam, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has many names for a file that is not its own
        why = type(error).__name__
        raise OSError(f"--sam {args.sam}: cannot be had, or holds no SAM ({why})") from error
    predictor = SamPredictor(sam.to(args.device))  # fp32: SAM fails in bf16
    for found, image in zip(boxes, tqdm(images, desc="segment")):
        mask = np.zeros(image.size[::-1], bool)
        if len(found):
            predictor.set_image(np.asarray(image))
        for box in found:  # all instances, not the largest
            mask |= predictor.predict(box=box, multimask_output=False)[0][0]  # (H, W)
        yield mask

def check_networks(args, concepts=()):
    """Refuse a local --sam or --detector that is none, reading no weights; and a remote one that cannot be
    had, if the masks of these concepts are still to be made."""
    here = Path(args.detector).exists()
    if here or any(c["detect"] != ["nudenet"] for c in concepts):
        try:
            MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING[type(AutoConfig.from_pretrained(args.detector))]
        except (KeyError, OSError, ValueError) as error:
            why = f"cannot be had ({type(error).__name__}): connect, or give a folder"
            if here or isinstance(error, KeyError):
                why = "is no OWLv2 or GroundingDINO, by its config.json"
            die(f"--detector {args.detector}: {why}")
    for names in (("*.safetensors", "*.bin"), ("*processor_config.json",)) if here else ():
        if not any(file for name in names for file in Path(args.detector).glob(name)):
            die(f"--detector {args.detector}: holds no {names[0]}")
    if here and not has_vocabulary(args.detector):
        die(f"--detector {args.detector}: holds no tokenizer.json")
    if any(c["task"] in ("object", "ip") for c in concepts) and "://" in args.sam:
        if not Path(torch.hub.get_dir(), "checkpoints", Path(args.sam).name).exists():  # torch.hub's place
            try:
                urlopen(Request(args.sam, method="HEAD"), timeout=10).close()
            except OSError as error:
                die(f"--sam {args.sam}: cannot be had ({error}): connect, or give a file")
    if Path(args.sam).exists():
        try:
            torch.load(args.sam, map_location="meta", weights_only=True)["image_encoder.pos_embed"]
        except Exception as error:  # torch has many names for a file that is not its own
            die(f"--sam {args.sam}: holds no SAM ({type(error).__name__})")

def lacks_masks(folder, concept):
    """Are networks needed for its masks? Not once they are begun, nor if all own pictures have theirs."""
    own = [file for file, _ in concept.get("pictures", ())]
    mine = own and all(file.with_suffix(".mask.png").exists() for file in own)
    return not (mine or (folder / "masks.json").exists())

def check_masks(folder, concept, args):
    """Refuse masks that other settings have made -> the settings, and how to make the masks again."""
    again = f"delete {shlex.quote(str(folder))}/*.mask.png and masks.json to make them again"
    settings = dict(detect=concept["detect"], task=concept["task"], threshold=args.threshold,
                    detector=args.detector, sam=args.sam, weights=args.weights)
    check_settings(folder / "masks.json", settings, f"{folder}/*.mask.png", again)
    return settings, again

def make_masks(files, concept, args):
    """Write X.mask.png beside each image, and masks-NAME.png -> the files in which something was found."""
    settings, again = check_masks(files[0].parent, concept, args)
    record = files[0].parent / "masks.json"
    masks = {f: f.with_suffix(".mask.png") for f in files}
    images = {f: open_image(f) for f in files}
    todo = [f for f in files if not masks[f].exists()]
    for file, mask in zip(todo, find_masks([images[f] for f in todo], concept, args)):
        if not record.exists():  # its commit is that of the first masks
            keep_settings(record, settings)
        save_image(Image.fromarray(mask), masks[file])  # an empty one records that nothing was found
    found = {f: np.asarray(open_image(masks[f], images[f].size)) > 127 for f in files}
    kept = [f for f in files if found[f].any()]
    area = np.mean([found[f].mean() for f in kept]) if kept else 0
    what = " / ".join(concept["detect"])
    full = sum(found[f].all() for f in kept)
    print(f"masks: {what} found in {len(kept)} of {len(files)} images, mean area {area:.1%}" +
          f"; {full} masks are the whole image" * bool(full))
    overlays = []
    for file in files[:50]:
        reddened = Image.blend(images[file], Image.new("RGB", images[file].size, "red"), 0.5)
        overlays += [images[file], Image.composite(reddened, images[file], Image.fromarray(found[file]))]
    sheet = args.out / f"masks-{concept['name']}.png"
    contact_sheet(overlays, sheet)
    if len(kept) < args.min_found * len(files):
        die(f"nothing found in {len(files) - len(kept)} of {len(files)} images, see {sheet}: "
            f"lower --min-found; or lower --threshold or change the file's detect:, and {again}", 1)
    return kept

def main(args):
    concepts, files = setup(args), []
    for concept in concepts:
        folder = args.out / "forget" / concept["name"]  # [0-9]: not the X.mask.png
        files.append(sorted(folder.glob("*[0-9].png")) or die(f"{folder}: no images; run sample.py first"))
        check_networks(args, [concept] if lacks_masks(folder, concept) else [])
        check_masks(folder, concept, args)
    with lock(args.out), PartialState().main_process_first():
        for found, concept in zip(files, concepts):
            make_masks(found, concept, args)

if __name__ == "__main__":
    guarded(main, ARGS)
