// The page: reads the form, shows what the worker reports. Knows nothing of models and tokens' meaning.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const columns = ["base", "steered"];
let rule = { strength: 1, threshold: 1, gated: false };
let answers = {}; // by column: the tokens' ids, and the text after each of them

const handlers = {
  progress({ loaded, total }) {
    if (at("loading").hidden) return; // a file that still came when another had failed
    at("loading").value = total ? loaded / total : 0;
    say(`Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`);
  },
  ready(settings) {
    rule = settings;
    at("loading").hidden = true;
    at("ignore").hidden = !rule.gated;
    at("about").textContent = describe(rule);
    if (rule.example && at("prompt").value === at("prompt").defaultValue) at("prompt").value = rule.example;
    showStrength();
    busy(false);
    say("Ready.");
  },
  decision({ probability, steered }) {
    at("gate").hidden = !rule.gated;
    at("gate").style.setProperty("--p", probability);
    at("gate").style.setProperty("--t", rule.threshold);
    at("gate").dataset.probability = probability;
    at("gate").dataset.steered = steered;
    at("decision").textContent = at("always").checked
      ? `p(correct) = ${short(probability)}; steered, whatever the gate says.`
      : `p(correct) = ${short(probability)}, ${steered ? "below" : "not below"} the threshold ${short(rule.threshold)}: ` +
        (steered ? "this prompt is steered." : "this prompt is left to the base model.");
  },
  token({ column, id, text, perSecond }) {
    answers[column].ids.push(id);
    answers[column].texts.push(text);
    at(`${column}-speed`).textContent = `${answers[column].ids.length} tokens, ${perSecond.toFixed(1)} per second`;
    columns.forEach(show);
  },
  done({ stopped }) {
    const [one, other] = columns.map((column) => answers[column].ids);
    const shared = common(one, other);
    const equal = shared === one.length && shared === other.length;
    at("parting").textContent = equal ? "Both answers are the same, token for token." : `They part at token ${shared + 1}.`;
    busy(false);
    say(stopped ? "Stopped." : "Done.");
  },
  failed({ message }) {
    at("loading").hidden = true;
    busy(false);
    say(message, true);
  },
};

worker.onmessage = ({ data }) => handlers[data.kind](data);
worker.onerror = (event) => handlers.failed({ message: event.message || "This browser cannot run the model." });

at("strength").oninput = showStrength;
at("stop").onclick = () => worker.postMessage({ kind: "stop" });
at("ask").onsubmit = (event) => {
  event.preventDefault();
  for (const column of columns) {
    answers[column] = { ids: [], texts: [] };
    at(`${column}-speed`).textContent = "";
    show(column);
  }
  at("gate").hidden = true;
  at("parting").textContent = "";
  busy(true);
  say("Reading the prompt …");
  worker.postMessage({
    kind: "generate",
    prompt: at("prompt").value,
    strength: strength(),
    threshold: at("always").checked ? 2 : rule.threshold, // every p(correct) is below 2
    newTokens: Number(at("tokens").value),
  });
};

showStrength();
say("Loading the model …");
worker.postMessage({ kind: "load" });

function strength() {
  return rule.strength * Number(at("strength").value);
}

function showStrength() {
  const times = Number(at("strength").value);
  const meaning = times === 0 ? "0: the base model" : `${short(strength())}, ${times.toFixed(2)} times the rule's`;
  at("strength-text").textContent = meaning;
  at("strength").setAttribute("aria-valuetext", meaning);
}

function show(column) {
  const { ids, texts } = answers[column];
  const [one, other] = columns.map((name) => answers[name]?.ids ?? []);
  const shared = common(one, other);
  const text = texts.at(-1) ?? "";
  const same = shared === Math.min(one.length, other.length) ? text : texts[shared - 1] ?? "";
  const marked = document.createElement("mark");
  marked.textContent = text.slice(same.length);
  at(column).replaceChildren(...(marked.textContent ? [text.slice(0, same.length), marked] : text ? [text] : []));
  at(column).dataset.tokens = ids.join(" ");
}

// How many tokens both begin with.
function common(one, other) {
  let count = 0;
  while (count < Math.min(one.length, other.length) && one[count] === other[count]) count += 1;
  return count;
}

function describe({ strength: own, layers, start, gated, threshold }) {
  const which = gated ? `prompts with p(correct) below ${short(threshold)}` : "every prompt";
  const first = start === "last_prompt_token" ? "the last prompt token" : "the first generated token";
  return `The rule steers ${which} from ${first} on, in ${layers.length} of the layers, with strength ${short(own)}.`;
}

function busy(now) {
  at("go").disabled = now;
  at("stop").disabled = !now;
}

function say(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("failed", failed);
}

function short(number) {
  return Number(number.toPrecision(4)).toString();
}

function megabytes(bytes) {
  return Math.round(bytes / 1e6);
}
