"""Two examples of every command, shown below its options."""

EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": (
        "adaras-export demo",
        "adaras-export demo --model smollm2 --out smollm2-out",
    ),
    "questions": (
        "adaras-export questions gsm8k --out questions --parts identify=400,validation=300,test=1000",
        "adaras-export questions reasoning-gym:chain_sum --size 500 --seed 1 --out questions.jsonl",
    ),
    "collect": (
        "adaras-export collect identify.jsonl -m Qwen/Qwen3-1.7B -o traces.jsonl --attempts 8",
        "adaras-export collect identify.jsonl -m TEACHER -o traces.jsonl --endpoint http://127.0.0.1:8000/v1",
    ),
    "identify": (
        "adaras-export identify traces.jsonl -m Qwen/Qwen3-1.7B -o neurons.safetensors",
        "adaras-export identify traces.jsonl -m Qwen/Qwen3-1.7B -o n.safetensors --ranking attribution --keep 100",
    ),
    "merge": (
        "adaras-export merge part0.safetensors part1.safetensors -o neurons.safetensors",
        "adaras-export merge part0.safetensors part1.safetensors -o neurons.safetensors --ranking attribution",
    ),
    "gate": (
        "adaras-export gate traces.jsonl -m Qwen/Qwen3-1.7B -o gate.safetensors",
        "adaras-export gate traces.jsonl -m Qwen/Qwen3-1.7B -o gate.safetensors --pooling attention --features 64",
    ),
    "tune": (
        "adaras-export tune validation.jsonl -m Qwen/Qwen3-1.7B --neurons neurons.safetensors -o rule.safetensors",
        "adaras-export tune validation.jsonl -m Qwen/Qwen3-1.7B --neurons neurons.safetensors --gate gate.safetensors "
        "--strengths 0.3:10 --trials 40 -o rule.safetensors",
    ),
    "rule": (
        "adaras-export rule neurons.csv -m Qwen/Qwen3-1.7B -o rule.safetensors",
        "adaras-export rule neurons.safetensors --gate gate.safetensors --strength 2 --keep 50 -o rule.safetensors",
    ),
    "eval": (
        "adaras-export eval test.jsonl -m Qwen/Qwen3-1.7B --rule rule.safetensors -o evaluation.json",
        "adaras-export eval test.jsonl -m Qwen/Qwen3-1.7B --rule rule.safetensors -o evaluation.json "
        "--samples 8 --temperature 0.6",
    ),
    "report": (
        "adaras-export report evaluation.json -o report.html",
        "adaras-export report evaluation.json other.json -o report.md",
    ),
    "export": (
        "adaras-export export rule.safetensors -m Qwen/Qwen3-1.7B --to hf -o steered",
        "adaras-export export rule.safetensors -m Qwen/Qwen3-1.7B --to gguf -o steered-gguf --accept-loss gate,start",
    ),
    "request": (
        "adaras-export request rule.safetensors -m Qwen/Qwen3-1.7B -o request.json",
        "adaras-export request rule.safetensors -m Qwen/Qwen3-1.7B -o request.json --accept-loss gate",
    ),
    "verify": (
        "adaras-export verify steered",
        "adaras-export verify steered --offline-hashes --key public.pem",
    ),
    "refresh": (
        "adaras-export refresh steered",
        "adaras-export refresh steered --model models/Qwen3-1.7B",
    ),
    "card": (
        "adaras-export card steered --repository user/steered",
        "adaras-export card steered --evaluation evaluation.json --dataset user/traces",
    ),
    "sign": (
        "adaras-export sign steered private.pem",
        "adaras-export sign steered private.pem --json",
    ),
    "push": (
        "adaras-export push steered user/steered --dry-run",
        "adaras-export push steered user/steered --public --yes",
    ),
    "doctor": (
        "adaras-export doctor",
        "adaras-export doctor --json",
    ),
}


def epilog(command: str) -> str:
    """The examples as paragraphs, which the help keeps apart."""
    return "\n\n".join(["Examples:", *EXAMPLES[command]])
