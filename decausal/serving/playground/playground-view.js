// Shows a row as it is written: one frame for every forward pass, tokens coloured by confidence or order.

const shown = (piece) => JSON.stringify(piece).slice(1, -1);
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : noun.endsWith("s") ? "es" : "s"}`;

export class Pane {
  constructor(element) {
    this.element = element;
    this.page = element.querySelector(".page");
    this.figures = element.querySelector(".figures");
    this.note = element.querySelector(".token");
    this.page.addEventListener("keydown", (event) => this.#walk(event));
    this.page.addEventListener("click", (event) => this.#choose(event.target.closest(".kept")));
    this.begin(["", 0, ""]);
  }

  // Starts a new row of given texts and gaps (numbers of tokens, null where unknown) in turn.
  begin(pieces) {
    Object.assign(this, { pieces, frames: [], text: null, chosen: null, seconds: null, numForwards: 0 });
    this.figures.textContent = this.note.textContent = "";
    this.show(0);
  }

  // Adds the frame of one pass, as the server's extension tells it.
  add(event) {
    const last = this.frames.at(-1);
    const stepOf = event.draft.map((piece, i) => (piece === null ? null : last?.stepOf[i] ?? null));
    for (const i of event.positions) stepOf[i] = event.step;
    this.frames.push({ ...event, stepOf });
  }

  // Shows the frame after that many passes.
  show(pass) {
    const frame = this.frames[Math.min(pass, this.frames.length) - 1];
    this.frame = frame;
    const isEnd = this.text !== null && pass >= this.frames.length;
    const between = frame ? this.#tokens(frame, pass, isEnd) : this.pieces.slice(1, -1).flatMap(waiting);
    this.page.replaceChildren(given(this.pieces[0]), ...between, given(this.pieces.at(-1)));
    this.#mark();
    this.#tell(frame, pass);
  }

  #tokens(frame, pass, isEnd) {
    const isNow = pass <= this.frames.length;
    const numSteps = Math.max(1, this.frames.length - 1);
    const isOver = (i) => isEnd && frame.draft[i] === null;
    return frame.draft.flatMap((piece, i) => {
      if (isOver(i)) return [];
      if (frame.is_given[i]) return [given(piece)];
      const span = document.createElement("span");
      span.dataset.place = i;
      span.className = `token-box ${piece === null ? "open" : "kept"}`;
      span.textContent = piece === null ? "··" : piece;
      if (piece === null) return [span];
      if (piece === "" && isWaiting(frame.draft, i)) span.classList.add("part");
      if (piece.includes("\n")) span.classList.add("newline");
      if (isNow && frame.positions.includes(i) && !isEnd) span.classList.add("fresh");
      span.style.setProperty("--p", `${100 * Math.max(0, Math.min(1, frame.confidence[i] ?? 1))}%`);
      span.style.setProperty("--o", `${(100 * (frame.stepOf[i] ?? 0)) / numSteps}%`);
      span.title = this.#describe(frame, i);
      return [span];
    });
  }

  #describe(frame, i) {
    const sure = frame.confidence[i] === null ? "" : `confidence ${frame.confidence[i].toFixed(2)}, `;
    const piece = frame.draft[i] === "" ? "part of a character" : `“${shown(frame.draft[i])}”`;
    return `${piece}: ${sure}kept in pass ${(frame.stepOf[i] ?? 0) + 1}`;
  }

  #tell(frame, pass) {
    if (!frame) return;
    const written = frame.draft.filter((piece, i) => piece !== null && !frame.is_given[i]).length;
    const passes = Math.min(pass, this.frames.length);
    const rate = (written / Math.max(1, passes)).toFixed(2);
    const isSearched = this.pieces.includes(null) && this.numForwards > 0;
    const search = isSearched ? `, ${this.numForwards} with all lengths that were tried` : "";
    const time = this.seconds === null ? "" : `, ${this.seconds.toFixed(1)} s`;
    this.figures.textContent = `${count(written, "token")} in ${count(passes, "pass")} (${rate} a pass)${search}${time}`;
  }

  #walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const kept = [...this.page.querySelectorAll(".kept")];
    if (!step || !kept.length) return;
    event.preventDefault();
    const here = kept.findIndex((span) => Number(span.dataset.place) === this.chosen);
    const next = here < 0 ? (step > 0 ? 0 : kept.length - 1) : Math.max(0, Math.min(kept.length - 1, here + step));
    this.#choose(kept[next]);
  }

  #choose(span) {
    if (!span) return;
    this.chosen = Number(span.dataset.place);
    this.#mark();
    this.note.textContent = this.#describe(this.frame, this.chosen);
  }

  #mark() {
    for (const span of this.page.querySelectorAll(".kept"))
      span.classList.toggle("chosen", Number(span.dataset.place) === this.chosen);
  }
}

// Whether the rest of the character that a token belongs to is still to come.
function isWaiting(draft, i) {
  const next = draft.slice(i).find((piece) => piece !== "");
  return next === null || next === undefined;
}

function given(text) {
  const span = document.createElement("span");
  span.className = "given";
  span.textContent = text;
  return span;
}

// What stands for a piece of the text before anything is written.
function waiting(piece) {
  if (typeof piece === "string") return [given(piece)];
  return Array.from({ length: Math.min(piece ?? 1, 1000) }, () => {
    const span = document.createElement("span");
    span.className = "token-box open";
    span.textContent = piece === null ? "?" : "··";
    return span;
  });
}
