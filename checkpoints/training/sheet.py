"""Contact sheet of fixed prompts, for training and the model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

COLUMNS = 6
PROMPTS = [
    "画一只猫，黄色背景，扁平风格",
    "a panda on a green background in classic style",
    "左边是一个苹果，右边是一根香蕉，蓝色背景，经典风格",
    "a rocket above an elephant, pink background, flat style",
    "狐狸在火箭的右边，白色背景，扁平风格",
    'a sign that says "SALE" on an orange background',
    "从左到右依次是鲨鱼、闹钟，灰色的底，经典风格",
    "my daughter would love a koala, all purple behind it, flat style please",
    "小狗下面写着“你好”，青色背景，经典风格",
    'a birthday cake with the word "HAPPY" below, on a brown background',
    "一座很大的房子，红色背景，扁平化风格",
    "请画一个 pizza，black background，flat style",
]


def write_sheet(images: Tensor, path: Path) -> None:
    """Write images [n, 3, h, w] in [−1, 1] as one PNG."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = pixels.permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(rows[i : i + COLUMNS]), 1) for i in range(0, len(rows), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(path)
