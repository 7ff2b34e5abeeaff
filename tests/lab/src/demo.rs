//! Shows the main job of the project: each command that a user types, and its output.

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    lab::Lab,
    process::poll_until,
    progress::{say, step},
};

/// Number of sandboxes that the demo creates.
const SANDBOXES: &str = "6";
/// Longest wait for the reports of all nodes.
const REPORTED_WITHIN: Duration = Duration::from_secs(60);
/// Longest wait until the load on a node changes the answer. A report comes every few seconds, and
/// other work on the machine moves all nodes at once.
const ANSWERED_WITHIN: Duration = Duration::from_secs(45);
/// Time between two questions: each one is a program that needs CPU itself.
const ASKED_EVERY: Duration = Duration::from_secs(1);

/// Runs the demo on a lab that is up, and leaves the lab running.
pub fn demo(lab: &Lab) -> Result<()> {
    ensure!(lab.is_up(), "the lab is down: `make lab` starts it");
    let user = User { lab, env: environment(lab)? };

    heading("Three nodes, and what they report");
    poll_until(REPORTED_WITHIN, ASKED_EVERY, || {
        user.ready_nodes() == lab.nodes().map_or(0, |nodes| nodes.len())
    })
    .context("the nodes do not all report; see `lab status` and target/lab/log")?;
    user.types(&["node", "ls"])?;

    heading("Six sandboxes of a Debian template");
    let made = step("sandboxctl create --count 6", |_| {
        user.json(&["create", "--count", SANDBOXES, "--meta", "made-by=demo"])
    })?;
    let made = made.as_array().context("a list of sandboxes")?.clone();
    let ids: Vec<&str> = made.iter().filter_map(|sandbox| sandbox["id"].as_str()).collect();
    let first = *ids.first().context("at least one sandbox")?;

    heading("Where each went, and why: the decision as it was recorded");
    for id in &ids {
        user.tells_why(id)?;
    }
    user.types(&["explain", first])?;

    heading("Burden a node, and the answer changes");
    user.burdens()?;

    heading("A command in each");
    for id in &ids {
        user.types(&[
            "exec",
            id,
            "--",
            "sh",
            "-c",
            "echo $(hostname) at $(hostname -I)runs $(cat /proc/1/comm)",
        ])?;
    }

    heading("A page from one, by its public host name");
    let page = "echo '<h1>Hello from '$(hostname)'</h1>' > /srv/www/index.html";
    user.types(&["exec", first, "--shell", page])?;
    user.types(&["expose", first, "8000", "--name", "web"])?;
    let url = user.json(&["url", first, "web"])?;
    let url = url["url"].as_str().context("an address")?;
    // Browsers and curl resolve *.localhost by themselves.
    shows("curl", &["-sS", "-i", "--max-time", "20", url])?;
    println!();
    user.types(&["hide", first, "web"])?;
    shows("curl", &["-sS", "-i", "--max-time", "20", url])?;
    println!();

    heading("One deleted, and what there is");
    user.types(&["rm", ids.last().copied().unwrap_or(first)])?;
    user.types(&["ls"])?;
    user.types(&["admin", "fsck"])?;

    heading("The lab goes on running");
    let dir = lab.layout().dir().display();
    println!(
        "  . {dir}/env                      puts a configured sandboxctl on the PATH\n  \
         sandboxctl --help                what it can do\n  \
         sandboxctl exec -it {first} -- bash\n  \
         {dir}/bin/lab status             the nodes and their daemons; logs are in {dir}/log\n  \
         {dir}/bin/lab exec node1 -- bash a shell on a node: look at /etc/pve, pct list, lxc-ls -f\n  \
         {dir}/bin/lab node kill node3    cut a node's power; `node boot node3` brings it back\n  \
         make lab-down                    takes it all away"
    );
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// A user whose shell has the variables of target/lab/env.
struct User<'a> {
    lab: &'a Lab,
    env: BTreeMap<String, String>,
}

impl User<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.lab.layout().dir().join("bin/sandboxctl"));
        command.args(words).envs(&self.env).stdin(Stdio::null());
        command
    }

    /// Prints a command line, runs it and shows its output.
    fn types(&self, words: &[&str]) -> Result<()> {
        println!("$ sandboxctl {}", quoted(words));
        let status = self.command(words).status().context("cannot run sandboxctl")?;
        ensure!(status.success(), "sandboxctl {} failed: {status}", quoted(words));
        Ok(())
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let output = self.command(words).arg("--json").output().context("cannot run sandboxctl")?;
        ensure!(
            output.status.success(),
            "sandboxctl {}: {}",
            quoted(words),
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).context("sandboxctl printed no JSON")
    }

    fn ready_nodes(&self) -> usize {
        let nodes = self.json(&["nodes"]).unwrap_or_default();
        nodes.as_array().map_or(0, |n| n.iter().filter(|node| node["ready"] == true).count())
    }

    /// Prints one line: the chosen node and the scores of all nodes.
    fn tells_why(&self, id: &str) -> Result<()> {
        let why = self.json(&["explain", id])?;
        let scores: Vec<String> = why["nodes"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|verdict| {
                let node = verdict["id"].as_str().unwrap_or("?");
                match verdict["filtered"].as_str() {
                    Some(reason) if !reason.is_empty() => format!("{node} {reason}"),
                    _ => format!("{node} {:.3}", verdict["score"].as_f64().unwrap_or_default()),
                }
            })
            .collect();
        println!(
            "{id}  {}  (lowest wins: {})",
            why["node"].as_str().unwrap_or("?"),
            scores.join(", ")
        );
        Ok(())
    }

    /// Asks where the next sandbox would go, loads that node, and asks again.
    ///
    /// Fails only if an answer cannot be had. The CPU share of the busy loops depends on what else
    /// runs on the machine, so none is asserted: on a busy machine the answer may rightly stay the
    /// same, and the demo says so.
    fn burdens(&self) -> Result<()> {
        let before = self.next_node()?.context("no node has room")?;
        println!("the next would go to {before}; now {LOOPS} busy loops in it");
        let hog = Hog::start(self.lab, &before)?;
        let changed = step(&format!("waiting for {before} to report it"), |_| {
            let avoided = || {
                self.stands_out(&before)
                    && self.next_node().is_ok_and(|node| node.as_deref() != Some(&before))
            };
            Ok(poll_until(ANSWERED_WITHIN, ASKED_EVERY, avoided).is_ok())
        })?;
        if !changed {
            println!(
                "the answer is still {before}: the machine has so much else to do that the loops make \
                 no difference between its nodes"
            );
        }
        self.types(&["explain", "--dry-run"])?;
        drop(hog);
        Ok(())
    }

    /// Returns the node where a new sandbox would go now.
    fn next_node(&self) -> Result<Option<String>> {
        let answer = self.json(&["explain", "--dry-run"])?;
        Ok(answer["node"].as_str().map(str::to_owned))
    }

    /// Returns whether a node reports more CPU in use than each of the others.
    fn stands_out(&self, node: &str) -> bool {
        let nodes = self.json(&["nodes"]).unwrap_or_default();
        let busy = |one: &Value| one["load"]["cpu_busy"].as_f64().unwrap_or_default();
        let (own, others): (Vec<&Value>, Vec<&Value>) =
            nodes.as_array().into_iter().flatten().partition(|one| one["id"] == node);
        own.iter().any(|own| others.iter().all(|other| busy(other) < busy(own)))
    }
}

/// Number of busy loops: enough to keep two cores busy, whatever else runs.
const LOOPS: usize = 4;

/// Busy loops in a node; dropping the value ends them.
struct Hog(Vec<Child>);

impl Hog {
    fn start(lab: &Lab, node: &str) -> Result<Hog> {
        let node = lab.node(node)?;
        let mut hog = Hog(Vec::new());
        for _ in 0..LOOPS {
            // Each loop has its own `lab exec`; killing that process also kills the loop.
            let mut busy = node.command(["/bin/bash", "-c", "while :; do :; done"]);
            busy.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            hog.0.push(busy.spawn().context("cannot burden the node")?);
        }
        Ok(hog)
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        for child in &mut self.0 {
            if child.kill().and_then(|()| child.wait().map(drop)).is_err() {
                say("lab: a busy loop could not be ended");
            }
        }
    }
}

fn shows(program: &str, words: &[&str]) -> Result<()> {
    println!("$ {program} {}", quoted(words));
    let status = Command::new(program).args(words).stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{program} failed: {status}");
    Ok(())
}

/// Quotes a command line as a user would type it.
fn quoted(words: &[&str]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=".contains(c);
    let word = |word: &&str| {
        if !word.is_empty() && word.chars().all(plain) {
            (*word).to_owned()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    words.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Reads the variables that target/lab/env exports.
fn environment(lab: &Lab) -> Result<BTreeMap<String, String>> {
    let file = lab.layout().dir().join("env");
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("{} is not there: was everything built?", file.display()))?;
    let exported = text.lines().filter_map(|line| line.strip_prefix("export SANDBOXCTL_"));
    Ok(exported
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (format!("SANDBOXCTL_{name}"), value.trim_matches('\'').to_owned()))
        .collect())
}
