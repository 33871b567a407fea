// The page's texts in English and Chinese.

import { recall, remember } from "./dom.js";

const en = {
  language: "中文",
  languageLabel: "切换到中文",
  skip: "To the image",
  sheet: "Steps × guidance",
  key: "API key",
  useKey: "Use this key",
  keyHint: "The service asks for a key. It stays in this browser.",
  prompt: "Prompt",
  promptExample: "a red fox under a tree, snow — in any language",
  drop: "Drop an image here to begin with it, or",
  choose: "Choose an image…",
  chosenImage: "The image to begin with; what is painted will be drawn anew",
  paint: "Paint a mask…",
  remove: "Remove",
  strength: "Strength",
  strengthHint: "0.3 retouches the image, 1 ignores it. With a mask, 1 draws the painted part anew.",
  draw: "Draw",
  drawKey: "Ctrl ↵",
  drawKeyMac: "⌘ ↵",
  count: "Images",
  settings: "Settings",
  negative: "Negative prompt",
  negativeHint: "It needs guidance above 0.",
  model: "Model",
  size: "Size",
  width: "Width",
  height: "Height",
  square: "Square",
  portrait: "Portrait",
  landscape: "Landscape",
  tall: "Tall",
  wide: "Wide",
  sizeHint: "{min} to {max}, in steps of {multiple}",
  steps: "Steps",
  guidance: "Guidance",
  seed: "Seed",
  newSeed: "New for each image",
  loras: "LoRAs",
  weightOf: "Weight of {name}",
  result: "Result",
  progress: "Progress",
  actions: "With this image",
  empty: "Your image appears here.",
  cancel: "Cancel",
  edit: "Edit…",
  refine: "Refine",
  repeat: "Repeat",
  reuseSeed: "Keep this seed",
  details: "Recipe",
  download: "Download",
  session: "Session",
  undo: "Undo",
  redo: "Redo",
  newSession: "New",
  gallery: "Gallery",
  galleryHint: "The gallery is kept in this browser alone: the last 300 images.",
  images: "{count} images",
  image: "1 image",
  paintTitle: "Paint what to draw anew",
  paintHelp: "Paint with a mouse, a finger or a pen; the rest keeps every pixel.",
  paintKeys:
    "By keyboard: arrow keys move the brush (with Shift further), Space lowers or lifts it, " +
    "Enter paints a dot, [ and ] change its size, B brush, E erase, Ctrl+Z undo.",
  tools: "Tools",
  brush: "Brush",
  erase: "Erase",
  brushSize: "Size",
  markAll: "Mark all",
  invert: "Invert",
  clear: "Clear",
  canvas: "Mask",
  back: "Cancel",
  useMask: "Use",
  brushDown: "Brush lowered",
  brushUp: "Brush lifted",
  close: "Close",
  continueFrom: "Continue from this",
  useSettings: "Use these settings",
  inputImage: "Input image",
  inputMask: "Mask",
  delete: "Delete",
  command: "Command",
  json: "JSON",
  copy: "Copy",
  copied: "Copied",
  sheetHelp: "Draws the prompt with one seed at each number of steps and each guidance, to compare what they do.",
  drawSheet: "Draw the sheet",
  sheetNumbers: "Expected numbers, separated by commas: at most 36 images in all.",
  sheetSteps: "steps {value}",
  sheetGuidance: "guidance {value}",
  queued: "Waiting, {count} before this one",
  queuedNext: "Waiting, next in line",
  running: "Begins…",
  step: "Step {step} of {steps}",
  done: "The image is there.",
  cancelled: "Cancelled",
  failed: "Failed: {message}",
  unreachable: "The service does not answer. Is it running?",
  notAnImage: "This file cannot be read as an image.",
  draw_kind: "Draw",
  edit_kind: "Edit",
  refine_kind: "Refine",
  sheet_kind: "Sheet",
  altImage: "Drawn from: {prompt}",
};

const zh = {
  language: "English",
  languageLabel: "Switch to English",
  skip: "跳到图像",
  sheet: "步数 × 引导",
  key: "API 密钥",
  useKey: "使用此密钥",
  keyHint: "服务要求提供密钥。密钥只保存在此浏览器中。",
  prompt: "提示词",
  promptExample: "雪中树下的一只红狐狸——任何语言均可",
  drop: "将图像拖到这里作为起点，或",
  choose: "选择图像…",
  chosenImage: "作为起点的图像；涂抹的部分将重新绘制",
  paint: "绘制蒙版…",
  remove: "移除",
  strength: "强度",
  strengthHint: "0.3 为轻微修饰，1 则忽略原图。使用蒙版时，1 会完全重绘涂抹的部分。",
  draw: "绘制",
  drawKey: "Ctrl ↵",
  drawKeyMac: "⌘ ↵",
  count: "张数",
  settings: "设置",
  negative: "反向提示词",
  negativeHint: "引导大于 0 时才起作用。",
  model: "模型",
  size: "尺寸",
  width: "宽",
  height: "高",
  square: "方形",
  portrait: "竖幅",
  landscape: "横幅",
  tall: "长竖幅",
  wide: "宽横幅",
  sizeHint: "{min} 到 {max}，须为 {multiple} 的倍数",
  steps: "步数",
  guidance: "引导",
  seed: "种子",
  newSeed: "每张图像都换新",
  loras: "LoRA",
  weightOf: "{name} 的权重",
  result: "结果",
  progress: "进度",
  actions: "对此图像",
  empty: "图像将显示在这里。",
  cancel: "取消",
  edit: "编辑…",
  refine: "细化",
  repeat: "重画",
  reuseSeed: "保留此种子",
  details: "配方",
  download: "下载",
  session: "会话",
  undo: "撤销",
  redo: "重做",
  newSession: "新建",
  gallery: "图库",
  galleryHint: "图库只保存在此浏览器中：最近 300 张图像。",
  images: "{count} 张图像",
  image: "1 张图像",
  paintTitle: "涂抹要重新绘制的部分",
  paintHelp: "用鼠标、手指或笔涂抹，其余部分逐像素保留。",
  paintKeys:
    "键盘操作：方向键移动画笔（按住 Shift 移动更远），空格键落笔或提笔，" +
    "回车键点一下，[ 和 ] 调整大小，B 画笔，E 橡皮，Ctrl+Z 撤销。",
  tools: "工具",
  brush: "画笔",
  erase: "橡皮",
  brushSize: "大小",
  markAll: "全选",
  invert: "反选",
  clear: "清除",
  canvas: "蒙版",
  back: "取消",
  useMask: "使用",
  brushDown: "已落笔",
  brushUp: "已提笔",
  close: "关闭",
  continueFrom: "从此图继续",
  useSettings: "使用这些设置",
  inputImage: "输入图像",
  inputMask: "蒙版",
  delete: "删除",
  command: "命令",
  json: "JSON",
  copy: "复制",
  copied: "已复制",
  sheetHelp: "用同一个种子，在每种步数和每种引导下绘制提示词，以便比较它们的作用。",
  drawSheet: "绘制对照表",
  sheetNumbers: "请输入以逗号分隔的数字，总共最多 36 张图像。",
  sheetSteps: "{value} 步",
  sheetGuidance: "引导 {value}",
  queued: "等待中，前面还有 {count} 个任务",
  queuedNext: "等待中，下一个就是",
  running: "即将开始…",
  step: "第 {step} 步，共 {steps} 步",
  done: "图像已完成。",
  cancelled: "已取消",
  failed: "失败：{message}",
  unreachable: "服务没有响应。它在运行吗？",
  notAnImage: "无法将此文件读取为图像。",
  draw_kind: "绘制",
  edit_kind: "编辑",
  refine_kind: "细化",
  sheet_kind: "对照表",
  altImage: "绘制自：{prompt}",
};

const TEXTS = { en, zh };

let current = recall("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

/** Fires `change` when the language changes. */
export const language = new EventTarget();

/** A text in the page's language, with `{name}` replaced by the values. */
export function text(key, values = {}) {
  const found = TEXTS[current]?.[key] ?? en[key];
  return found.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** The message of an error. */
export function problem(error) {
  return error.code === "unreachable" ? text("unreachable") : error.message;
}

/** Change to the other language. */
export function switchLanguage() {
  current = current === "zh" ? "en" : "zh";
  remember("language", current);
  translate();
  language.dispatchEvent(new Event("change"));
}

/** Put the texts into the elements that name them: `data-text`, `data-label`, `data-placeholder`. */
export function translate() {
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", text(element.dataset.label));
  }
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = text(element.dataset.placeholder);
  }
}
