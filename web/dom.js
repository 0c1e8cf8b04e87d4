// Small helpers to make elements; text is always text, never markup.

/** An element with properties and children; `aria`, `data` and `style` take objects. */
export function make(tag, { aria = {}, style = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A bar of coloured parts, each [class, share of the bar]; the text beside it says it all. */
export function bar(parts) {
  let left = 1;
  const element = make("div", { className: "distorch-bar", aria: { hidden: "true" } });
  for (const [className, share] of parts) {
    const width = Math.max(0, Math.min(share || 0, left));
    left -= width;
    if (width) element.append(make("span", { className, style: { width: `${width * 100}%` } }));
  }
  return element;
}

/** Load our style sheet once. */
export function dress() {
  const href = new URL("./distorch.css", import.meta.url).href;
  if (document.querySelector(`link[href="${href}"]`)) return;
  document.head.append(make("link", { rel: "stylesheet", href }));
}
