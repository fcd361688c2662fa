// Run in a report page: returns what is wrong with it, as sentences; an empty list when nothing is.
() => {
  const wrong = [];
  const say = (what, element) =>
    wrong.push(`${what}: <${element.tagName.toLowerCase()}> ${(element.textContent || "").trim().slice(0, 60)}`);
  const width = document.documentElement.clientWidth;
  const shown = (element) => element.checkVisibility() && getComputedStyle(element).clipPath === "none" &&
    !element.closest("thead[style], svg") && !hidden(element);
  const hidden = (element) => {
    const head = element.closest("thead");
    return head !== null && getComputedStyle(head).clipPath !== "none";
  };

  // Texts: the rectangles of their lines, their colours.
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (node.textContent.trim() === "" || !shown(element)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.width > 1) texts.push({ node, element, box });
    }
  }
  for (const { element, box } of texts) {
    if (box.left < -1 || box.right > width + 1) say("beyond the page", element);
  }
  if (document.documentElement.scrollWidth > width) say("the page scrolls sideways", document.body);
  for (const element of document.body.querySelectorAll("*")) {
    if (!shown(element)) continue;
    if (element.getBoundingClientRect().right > width + 1) say("beyond the page", element);
    if (getComputedStyle(element).overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1) {
      say("cut", element);
    }
  }
  texts.sort((a, b) => a.box.top - b.box.top);
  for (let i = 0; i < texts.length; i++) {
    for (let j = i + 1; j < texts.length && texts[j].box.top < texts[i].box.bottom - 4; j++) {
      const [a, b] = [texts[i].box, texts[j].box];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (texts[i].node !== texts[j].node && across > 2 && down > 4) say("lies on another text", texts[j].element);
    }
  }

  // Contrast after WCAG 2.
  const parse = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255).map((v) =>
      v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  for (const element of new Set(texts.map((one) => one.element))) {
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) say(`contrast ${ratio.toFixed(2)}`, element);
  }

  // Meaning without sight.
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const own = Number(heading.tagName[1]);
    if (own > level + 1) say(`heading ${own} after ${level}`, heading);
    level = own;
  }
  if (document.querySelectorAll("h1").length !== 1) say("not one first heading", document.body);
  if (document.documentElement.lang !== "en") say("no language", document.body);
  for (const name of ["header", "nav", "main", "footer"]) {
    if (document.querySelectorAll(name).length !== 1) say(`not one ${name}`, document.body);
  }
  for (const cell of document.querySelectorAll("th:not([scope])")) say("no scope", cell);
  for (const cell of document.querySelectorAll("td:not([data-label])")) say("no name when rows are blocks", cell);
  for (const picture of document.querySelectorAll("svg:not([aria-label])")) say("no words", picture);
  for (const link of document.querySelectorAll("a[href^='#']")) {
    if (!document.getElementById(link.hash.slice(1))) say("leads nowhere", link);
  }
  const names = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(names).size !== names.length) say("an id twice", document.body);
  return wrong;
}
