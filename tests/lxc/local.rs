//! docs/local.md, followed: the controller of the lab with the configuration of the page, its commands one after
//! another, and what it says about the URLs that lead past the ingress.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use lab::daemons::{CONTROLLER, CONTROLLER_CONFIG};
use serde_json::Value;

use crate::{
    procedures::blocks,
    world::{PATIENCE, World, id, node, wait, world},
};

/// Page that is followed.
const PAGE: &str = "local.md";

/// Returns the configuration that the page shows.
fn shown() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(PAGE);
    let text = fs::read_to_string(path).expect(PAGE);
    let (_, rest) = text.split_once("```toml\n# /etc/pve-sandbox/controller.toml\n").expect("one");
    rest.split_once("```").expect("an end").0.to_owned()
}

/// Configuration of the controller, until the lab's own is there again.
struct Configured<'a> {
    world: &'a World,
    file: PathBuf,
    before: String,
}

impl<'a> Configured<'a> {
    /// Writes the settings in place of those with the same names. The controller does not read them yet.
    fn with(world: &'a World, settings: &str) -> Self {
        let file = world.lab.layout().dir().join(CONTROLLER_CONFIG);
        let before = fs::read_to_string(&file).expect("the lab's configuration");
        let names: Vec<_> = settings.lines().filter_map(|line| line.split(" = ").next()).collect();
        let is_other =
            |line: &&str| line.split(" = ").next().is_none_or(|name| !names.contains(&name));
        let rest: Vec<_> = before.lines().filter(is_other).collect();
        // Before the first table, to which they would belong otherwise.
        fs::write(&file, format!("{settings}{}\n", rest.join("\n"))).expect("written");
        Self { world, file, before }
    }
}

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        fs::write(&self.file, &self.before).expect("written");
        restart(self.world);
    }
}

/// Restarts the controller, and waits until the nodes are there.
fn restart(world: &World) {
    world.lab.services().restart(CONTROLLER, PATIENCE).expect("restarted");
    wait("three nodes that are ready", || {
        let ran = world.ctl(&["--json", "nodes"]);
        let nodes = serde_json::from_slice::<Value>(&ran.stdout).unwrap_or_default();
        let all = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        all.len() == 3 && all.iter().all(|node| node["ready"] == true)
    });
}

/// Asks a URL from a node; returns the body, which is empty without an answer.
fn curl(world: &World, node: &str, url: &str) -> String {
    world.shell(node, &format!("curl -sS --noproxy '*' -m 5 '{url}' 2>/dev/null"))
}

#[test]
fn urls_without_a_domain_are_by_name_then_by_an_address_that_fits() {
    let Some(world) = world() else { return };
    let settings = |suffix: &str, prefix: &str| {
        format!(
            "url_template = \"\"\ncontainer_suffix = \"{suffix}\"\ncontainer_ip_prefix = \"{prefix}\"\n"
        )
    };
    let configured = Configured::with(&world, &settings("lan", ""));
    let program = world.lab.layout().dir().join("bin/pve-sandbox-controller");
    for (variable, is_valid) in [("10.100.", true), ("10.0.0.0/8", false)] {
        let mut check = Command::new(&program);
        let check = check.arg("check-config").arg(&configured.file);
        let ran = check.env("PVE_CONTAINER_IP_PREFIX", variable).output().expect("it runs");
        assert_eq!(ran.status.success(), is_valid, "{variable}: {ran:?}");
    }
    restart(&world);
    let sandbox = world.create(&["--expose", "web=8000"]);
    let id = id(&sandbox);
    let service = world.json(&["url", id, "web"]);
    assert_eq!(service["url"], format!("http://{id}.lan:8000"));
    let name = world.ctl(&["exec", id, "--", "hostname"]);
    assert_eq!(name.text().trim(), id, "the name that a DNS server knows it by");
    drop(configured);

    let configured = Configured::with(&world, &settings("", "192.0.2."));
    restart(&world);
    let none = world.ctl(&["url", id, "web"]);
    let ip = sandbox["ip"].as_str().expect("an address");
    assert_eq!((none.code, none.text()), (1, String::new()), "{}", none.stderr);
    assert!(none.stderr.contains("192.0.2.") && none.stderr.contains(ip), "{}", none.stderr);
    drop(configured);
    world.finish();
}

#[test]
fn sandboxes_are_used_without_a_domain_as_the_page_says() {
    let Some(world) = world() else { return };
    let configured = Configured::with(&world, &shown());
    let (mut sandbox, mut said) = (Value::Null, Vec::new());
    for command in blocks(PAGE).into_iter().flat_map(|block| block.commands) {
        let words: Vec<&str> = command.split(' ').collect();
        match words.as_slice() {
            ["pve-sandbox-controller", verb] => {
                let program = world.lab.layout().dir().join("bin/pve-sandbox-controller");
                let ran = Command::new(program).arg(verb).arg(&configured.file).output();
                let ran = ran.expect("it runs");
                assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
            }
            ["systemctl", "restart", "pve-sandbox-controller"] => restart(&world),
            ["sandboxctl", "create", more @ ..] => sandbox = world.create(more),
            ["sandboxctl", more @ ..] => {
                let own = id(&sandbox);
                let more: Vec<&str> =
                    more.iter().map(|word| if *word == "ID" { own } else { *word }).collect();
                let ran = world.ctl(&more);
                assert_eq!(ran.code, 0, "{command}: {}", ran.stderr);
                said.push((ran.text(), ran.stderr));
            }
            _ => panic!("{command} is not known here"),
        }
    }
    let [(url, note), (list, _)] = said.as_slice() else { panic!("another block: {said:?}") };
    let (url, ip) = (url.trim(), sandbox["ip"].as_str().expect("an address"));
    assert_eq!(url, format!("http://{ip}:8000"));
    assert!(ip.starts_with("10.100."), "{ip}");
    assert!(note.contains("past the rules"), "{note}");
    assert!(list.contains(id(&sandbox)), "{list}");

    // Who reaches it.
    let (id, own) = (id(&sandbox), node(&sandbox));
    let other = if own == "node1" { "node2" } else { "node1" };
    let page = "inside a sandbox";
    assert!(curl(&world, own, url).contains(page), "the node itself reaches {url}");
    assert_eq!(curl(&world, other, url), "", "another node does not");

    // `expose` opens nothing and `hide` closes nothing; credentials are printed alone.
    world.json(&["expose", id, "8000", "--name", "web", "--visibility", "token"]);
    let service = world.json(&["url", id, "web"]);
    assert_eq!((&service["bypasses_access"], &service["url"]), (&true.into(), &url.into()));
    let link = world.ctl(&["link", id, "web"]);
    assert!(link.code == 0 && link.text().starts_with("sbx"), "{}", link.text());
    assert!(link.stderr.contains("credential alone"), "{}", link.stderr);
    assert!(curl(&world, own, url).contains(page), "nothing is asked for");
    world.json(&["hide", id, "web"]);
    assert!(curl(&world, own, url).contains(page));
    drop(configured);
    world.finish();
}
