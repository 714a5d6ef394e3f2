"""Attacks by settings: typed, or in a folder of settings that somebody else wrote."""

from __future__ import annotations

from tests.attacks.attack import COPY, TYPED_COPY, Attack, folders, typed
from tests.attacks.ground import SECRET, SMALL, TOUCHED, Ground

_GLOBAL = "# @package _global_\n"
_MINE = "defaults: [_base]\nname: file\nsource: file\npath: rows.jsonl\n"
_ENV = "${oc.env:AWS_SECRET_ACCESS_KEY}"
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)

OBJECTS = typed(
    "S1",
    [
        ("model", "_target_ in the model", ("+model._target_=os.system",), "model._target_"),
        ("lora", "_target_ in the adapter", ("++lora._target_=torch.load",), "lora._target_"),
        ("root", "_target_ of the command", ("+_target_=os.system",), "_target_ is not"),
        ("new-node", "a node of its own", (f"+evil={TYPED_COPY}",), "evil is not a setting"),
        ("in-group", "a group replaced", (f"+train.x={TYPED_COPY}",), "train.x is not a"),
        ("partial", "_partial_ and _args_", ("+eval._args_=[id]",), "eval._args_ is not a"),
        (
            "in-map",
            "_target_ in a setting that takes names",
            ("lora.rank_pattern={_target_:8}",),
            "lora.rank_pattern._target_",
        ),
    ],
) + folders(
    "S1",
    [
        (
            "file-model",
            "a data set with _target_",
            {"data/evil.yaml": f"{_MINE}columns: {COPY}\n"},
            ("data=evil",),
            "data.columns._target_",
        ),
        (
            "file-global",
            "an experiment with _target_ in the model",
            {"experiment/evil.yaml": f"{_GLOBAL}model: {COPY}\n"},
            ("experiment=evil",),
            "model._target_",
        ),
        (
            "file-new",
            "an experiment with a node of its own",
            {"experiment/evil.yaml": f"{_GLOBAL}evil: {COPY}\n"},
            ("experiment=evil",),
            "evil._target_",
        ),
    ],
)


def _NODE(name: str) -> str:
    return f"hydra.{name}"


HYDRA = typed(
    "S2",
    [
        ("callback", "a callback", (f"+hydra.callbacks.x={TYPED_COPY}",), _NODE("callbacks.x")),
        (
            "callback-key",
            "a callback, key by key",
            ("++hydra.callbacks.x._target_=torch.load", "++hydra.callbacks.x.f=rows.jsonl"),
            _NODE("callbacks.x._target_"),
        ),
        ("own-callback", "our callback removed", ("~hydra.callbacks",), _NODE("callbacks")),
        (
            "own-callback-changed",
            "our callback replaced",
            ("hydra.callbacks.places._target_=os.getcwd",),
            _NODE("callbacks.places"),
        ),
        ("whole-node", "the whole node", (f"hydra={{callbacks:{{x:{TYPED_COPY}}}}}",), "hydra"),
        (
            "factory",
            "a factory of a logger",
            (f"+hydra.job_logging.handlers.x={{class:shutil.copyfile,dst:{TOUCHED}}}",),
            _NODE("job_logging"),
        ),
        (
            "log-class",
            "a class of a logger",
            ("+hydra.hydra_logging.handlers.x.class=os.system",),
            _NODE("hydra_logging"),
        ),
        (
            "log-file",
            "Hydra's logging into files",
            ("hydra/job_logging=default",),
            "hydra/job_logging cannot be set",
        ),
        ("launcher", "a launcher", ("hydra.launcher._target_=os.system",), _NODE("launcher")),
        ("launcher-map", "a launcher", (f"hydra.launcher={TYPED_COPY}",), _NODE("launcher")),
        ("basic", "Hydra's own launcher", ("hydra/launcher=basic",), "hydra/launcher must be"),
        ("joblib", "another launcher", ("hydra/launcher=joblib",), "hydra/launcher must be one"),
        ("no-launcher", "no launcher", ("~hydra/launcher",), "hydra/launcher cannot be set"),
        (
            "sweeper",
            "a sweeper",
            ("hydra.sweeper._target_=os.system",),
            "hydra.sweeper._target_ is not a setting",
        ),
        (
            "sweeper-inside",
            "an object within a sweeper",
            (f"+hydra.sweeper.params.x={TYPED_COPY}",),
            "hydra.sweeper.params.x",
        ),
        ("help", "Hydra's help", (f"hydra.help.template='{_ENV}'",), _NODE("help.template")),
        (
            "package",
            "a group put elsewhere",
            ("+data@hydra.callbacks.x=file",),
            "hydra.callbacks",
        ),
        (
            "import",
            "a package to import",
            ("hydra.searchpath=[pkg://antigravity]",),
            "--config-dir must name a folder",
        ),
    ],
) + folders(
    "S2",
    [
        (
            "file-callback",
            "a callback in an experiment",
            {"experiment/evil.yaml": f"{_GLOBAL}hydra: {{callbacks: {{x: {COPY}}}}}\n"},
            ("experiment=evil",),
            "hydra.callbacks must stay as it is",
        ),
        (
            "file-package",
            "a data set that is a callback",
            {"data/evil.yaml": f"# @package hydra.callbacks.x\n{COPY}\n"},
            ("data=evil",),
            "hydra.callbacks must stay as it is",
        ),
        (
            "file-logging",
            "loggers of an experiment",
            {
                "experiment/evil.yaml": f"{_GLOBAL}hydra: {{job_logging: {{handlers: {{x: "
                "{'()': shutil.copyfile}}}}\n"
            },
            ("experiment=evil",),
            "hydra.job_logging must stay as it is",
        ),
        (
            "file-launcher",
            "a launcher with the name of ours",
            {"hydra/launcher/local.yaml": f"{COPY}\n"},
            (),
            "hydra.launcher must be one of",
        ),
        (
            "file-sweeper",
            "a sweeper of an experiment",
            {"experiment/evil.yaml": f"{_GLOBAL}hydra: {{sweeper: {COPY}}}\n"},
            ("experiment=evil",),
            "hydra.sweeper",
        ),
        (
            "file-sweeper-inside",
            "an object within a search",
            {
                "experiment/evil.yaml": f"{_GLOBAL}defaults: [override /hydra/sweeper: optuna]\n"
                f"hydra: {{sweeper: {{when: {{lora.r: {COPY}}}}}}}\n"
            },
            ("experiment=evil",),
            "hydra.sweeper.when.lora.r._target_",
        ),
        (
            "file-dir",
            "Hydra's folder in an experiment",
            {"experiment/evil.yaml": f"{_GLOBAL}hydra: {{run: {{dir: ../outside/x}}}}\n"},
            ("experiment=evil",),
            "hydra.run must stay as it is",
        ),
        (
            "file-variables",
            "variables of the environment",
            {"experiment/evil.yaml": f"{_GLOBAL}hydra: {{job: {{env_set: {{A: b}}}}}}\n"},
            ("experiment=evil",),
            "hydra.job.env_set must stay as it is",
        ),
    ],
)


def _option(*argv: str) -> Attack:
    def run(ground: Ground) -> None:
        ground.write("evil.pickle", b"cos\nsystem\n(S'touch touched-by-an-attack'\ntR.")
        ground.write("conf/config.yaml", f"hydra: {{callbacks: {{x: {COPY}}}}}\n")
        ground.refused(*argv, says=" is not an option here")

    return Attack(argv[0].strip("-").partition("=")[0], "S2", " ".join(argv), run)


OPTIONS = [
    _option("--experimental-rerun=evil.pickle"),
    _option("--experimental-r=evil.pickle"),
    _option("--config-path=conf", *SMALL),
    _option("--config-name=evil", *SMALL),
    _option("--config-di=conf", *SMALL),
    _option("--hydra-help"),
]

_READS = "which reads the environment"
_CALLS = "none of the functions that settings may call"
SECRETS = typed(
    "S3",
    [
        ("study", "a secret as the name of a study", (f"study='{_ENV}'",), _READS),
        ("text", "a secret in a prompt", (f"data.system='{_ENV}'",), _READS),
        ("default", "with a default", ("study='${oc.env:HF_TOKEN,x}'",), _READS),
        ("within", "within a text", ("data.system='a ${oc.env:HF_TOKEN} b'",), _READS),
        ("spaces", "spelled with spaces", ("study='${ oc.env : HF_TOKEN}'",), _READS),
        (
            "computed",
            "a computed name",
            ("study='${oc.${data.system}:HF_TOKEN}'", "data.system=env"),
            _CALLS,
        ),
        ("decoded", "decoded", ("study='${oc.decode:${oc.env:HF_TOKEN}}'",), "study must be"),
        ("created", "created", ("data.system='${oc.create:{a:1}}'",), _CALLS),
        ("list", "in a list", (f"lora.targets=['{_ENV}']",), _READS),
        ("option", "as an option", (f"data='{_ENV}'",), "data must be one of"),
        ("search", "in a search", (f"hydra.sweeper.storage='{_ENV}'",), "hydra.sweeper.storage"),
        ("copied", "a copied variable", ("hydra.job.env_copy=[HF_TOKEN]",), _NODE("job.env_copy")),
        ("unknown-variable", "an unknown variable", ("study='${oc.env:NO_SUCH}'",), _READS),
        ("unknown-resolver", "an unknown function", ("study='${no.such:1}'",), _CALLS),
        ("unknown-key", "an unknown setting", ("study='${no.such}'",), "study must be a value"),
        ("cycle", "a cycle", ("study='${study}'",), "study must be a value"),
        (
            "long-cycle",
            "a cycle of two",
            ("study='${data.system}'", "data.system='${study}'"),
            "must be a value",
        ),
        ("number", "a number from nowhere", ("lora.r='${lora.x}'",), "lora.r must be a value"),
        ("unclosed", "an interpolation cut short", ("study='${lora.r'",), "must be a value"),
        ("missing", "a nested one from nowhere", ("study='${${x}}'",), "study must be a value"),
        (
            "place",
            "the folder of the studies from nowhere",
            ("sweeps_dir='${no.such}'",),
            "sweeps_dir must be a value",
        ),
        (
            "in-list",
            "a swept value from nowhere",
            ("data.system=a,'${no.such}'",),
            "data.system must",
        ),
    ],
) + folders(
    "S3",
    [
        (
            "file-env",
            "a secret in a data set",
            {"data/evil.yaml": f"{_MINE}system: '{_ENV}'\n"},
            ("data=evil",),
            _READS,
        ),
        (
            "file-defaults",
            "a secret as a group",
            {"experiment/evil.yaml": f"{_GLOBAL}defaults: [override /data: '{_ENV}']\n"},
            ("experiment=evil",),
            "",
        ),
        (
            "file-copied",
            "a copied variable",
            {"experiment/evil.yaml": f"{_GLOBAL}hydra: {{job: {{env_copy: [HF_TOKEN]}}}}\n"},
            ("experiment=evil",),
            "hydra.job.env",
        ),
        (
            "file-resolver",
            "a nested call in a file",
            {"data/evil.yaml": f"{_MINE}system: '${{oc.dict.values:hydra.job}}'\n"},
            ("data=evil",),
            _CALLS,
        ),
    ],
)

_NAME = "study must be 1 to 64 letters"
PATHS = typed(
    "S4",
    [
        ("parent", "a study above its root", ("study=../outside/x",), _NAME),
        ("absolute", "an absolute study", ("study=/tmp/x",), _NAME),
        ("nested", "a study with a slash", ("study=a/b",), _NAME),
        ("dots", "two dots", ("study=..",), _NAME),
        ("backslash", "backslashes", (r"study='..\\x'",), _NAME),
        ("long", "300 characters", (f"study={'x' * 300}",), _NAME),
        ("slash", "another slash", ("study='a∕b'",), _NAME),
        ("newline", "a line break", ("study='a\nb'",), _NAME),
        ("option", "a name like an option", ("study='-rf'",), _NAME),
        ("run-dir", "Hydra's folder", ("hydra.run.dir=../outside/x",), _NODE("run.dir")),
        ("sweep-dir", "Hydra's folder", ("hydra.sweep.dir=../outside/x",), _NODE("sweep.dir")),
        ("subdir", "a folder in it", ("hydra.sweep.subdir=../../x",), _NODE("sweep.subdir")),
        ("output", "its settings", ("hydra.output_subdir=../x",), _NODE("output_subdir")),
        ("name", "the name of a job", ("hydra.job.name=../x",), _NODE("job.name")),
        ("chdir", "another working folder", ("hydra.job.chdir=true",), _NODE("job.chdir")),
        ("env-set", "variables", ("+hydra.job.env_set.PATH=.",), _NODE("job.env_set")),
        ("runtime", "what Hydra says", ("hydra.runtime.cwd=/",), _NODE("runtime.cwd")),
        ("group", "a file outside of conf", ("data=../../../outside/precious",), "data must be"),
        ("experiment", "the same", ("experiment=../outside/precious",), "experiment must be"),
        (
            "repo",
            "a repository that is a path",
            ("model=hub", "model.repo=../outside"),
            "model.repo must be",
        ),
    ],
)

SHELLS = typed(
    "S5",
    [
        ("slurm", "a cluster", ("hydra/launcher=slurm",), "hydra/launcher must be one of"),
        ("submitit", "the same", ("hydra/launcher=submitit_local",), "hydra/launcher must be"),
        (
            "setup",
            "commands of a job",
            ("+hydra.launcher.setup=['touch x']",),
            _NODE("launcher.setup"),
        ),
        ("substituted", "a command in a name", ("study='$(touch x)'",), "study"),
        ("backtick", "the same", ("study='`touch x`'",), "study"),
        ("directive", "a line of a job file", ("study='a\n#SBATCH -A x'",), "study"),
    ],
)

RAY = typed(
    "S15",
    [
        ("ray", "a cluster of Ray", ("hydra/launcher=ray",), "hydra/launcher must be one of"),
        ("address", "its address", ("+hydra.launcher.ray.address=x",), _NODE("launcher.ray")),
    ],
)

_URL = f"postgresql://me:{SECRET}@127.0.0.1:9/db"
DATABASES = typed(
    "S16",
    [
        (
            "storage",
            "a password for Optuna",
            ("hydra/sweeper=optuna", f"hydra.sweeper.storage='{_URL}'", "lora.r=choice(2,4)"),
            "",
        ),
        ("sql", "SQL in a name", ('study="x\'; DROP TABLE runs; --"',), "study"),
        (
            "tracking",
            "a password for MLflow",
            ("tracking=mlflow", f"tracking.uri='http://me:{SECRET}@127.0.0.1:9'"),
            "tracking.uri must not hold a password",
        ),
    ],
)

YAML = folders(
    "S11",
    [
        (
            "object",
            "an object in YAML",
            {"data/evil.yaml": f"{_MINE}system: !!python/object/apply:os.system ['touch x']\n"},
            ("data=evil",),
            "",
        ),
        ("bomb", "aliases", {"data/evil.yaml": _BOMB + _MINE}, ("data=evil",), "aliases"),
        (
            "recursive",
            "an alias within itself",
            {"data/evil.yaml": f"{_MINE}system: &a [*a]\n"},
            ("data=evil",),
            "aliases",
        ),
        (
            "large",
            "10 MB",
            {"data/evil.yaml": _MINE + "# filler\n" * 1_200_000},
            ("data=evil",),
            "at most 262144 bytes",
        ),
        (
            "deep",
            "100,000 brackets",
            {"data/evil.yaml": f"{_MINE}system: {'[' * 100_000}\n"},
            ("data=evil",),
            "must be a YAML file",
        ),
        (
            "twice",
            "a key twice",
            {"data/evil.yaml": f"{_MINE}n: 3\nn: 4\n"},
            ("data=evil",),
            "",
        ),
        (
            "no-map",
            "a list in place of settings",
            {"data/evil.yaml": "- a\n- b\n"},
            ("data=evil",),
            "",
        ),
    ],
)

ATTACKS = [
    *(OBJECTS + HYDRA + OPTIONS + SECRETS + PATHS),
    *(SHELLS + RAY + DATABASES + YAML),
]
