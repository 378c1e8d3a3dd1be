"""A benchmark of vla-eval's own kind: two tasks of six steps, with the pictures and states of `observations`."""

from vla_eval.benchmarks.base import StepBenchmark, StepResult

from support.backbones import observations

TASKS, STEPS = 2, 6
executed: dict[str, list] = {}  # task -> the actions of its last episode


def shown(task: int) -> list[dict]:
    """What each step of a task shows, as a policy's observations."""
    return observations(STEPS, seed=task)


class Toy(StepBenchmark):
    """Shows one recorded observation after the other."""

    def __init__(self, send_state: bool = False):
        super().__init__()
        assert send_state  # the server asks for it

    def get_tasks(self):
        return [{"name": f"task {number}", "number": number} for number in range(TASKS)]

    def reset(self, task):
        self.task, self.place = task, 0
        executed[task["name"]] = []
        return shown(task["number"])[0]

    def step(self, action):
        executed[self.task["name"]].append(action["actions"])
        self.place += 1
        done = self.place == STEPS
        return StepResult(shown(self.task["number"])[self.place % STEPS], 0.0, done, {})

    def make_obs(self, raw_obs, task):
        images = {"agentview": raw_obs["images"]["image"]}
        return {"images": images, "states": raw_obs["state"], "task_description": raw_obs["task"]}

    def get_step_result(self, step_result):
        return {"success": True}

    def get_metadata(self):
        return {"max_steps": 20}
