//! `pve-sandbox-controller doctor`: each finding comes with what was broken, and goes with its remedy, which
//! is run by the program's own commands.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    process::Command as Process,
    time::Duration,
};

use clap::{FromArgMatches as _, Subcommand as _};
use controller::{
    ca,
    commands::Command,
    doctor, setup,
    store::{Store as _, sqlite::Sqlite},
};
use daemon::{
    doctor::{Check, State},
    flow::Leg,
};
use proto::sandbox::v1::{
    CreateNodeTokenRequest, enrolment_service_client::EnrolmentServiceClient,
};
use tonic::{Request, metadata::MetadataValue};

use crate::{
    patient::{Patient, assert_root},
    sick::TIMEDATECTL,
};

struct Controller {
    dir: tempfile::TempDir,
    port: u16,
}

impl Controller {
    /// Sets a controller up as an operator does, and starts nothing.
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let controller = Self { dir, port };
        let clock = controller.file("timedatectl");
        let script = format!("#!/bin/sh\nROOT={}\n{TIMEDATECTL}\n", controller.text(""));
        fs::write(&clock, script).expect("written");
        fs::set_permissions(&clock, fs::Permissions::from_mode(0o755)).expect("executable");
        controller.set_up().await;
        controller
    }

    /// Runs `setup` with the places of this controller.
    async fn set_up(&self) {
        let [config, data, home] =
            ["controller.toml", "data", "home/config.toml"].map(|name| self.text(name));
        let setup = format!(
            "pve-sandbox-controller setup --config {config} --data-dir {data} --domain sandbox.test \
             --no-start --sandboxctl-config {home}"
        );
        self.run(&setup).await;
        let (file, listen) = (self.file("controller.toml"), format!("127.0.0.1:{}", self.port));
        let text = fs::read_to_string(&file).expect("read");
        if !text.contains(&listen) {
            fs::write(&file, format!("listen = \"{listen}\"\n{text}")).expect("written");
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// Makes a token for a node by the API, with the token that `setup` has saved.
    async fn make_a_node_token(&self) {
        let roots = daemon::tls::client_with_roots(&self.file("data/ca/ca.crt")).expect("roots");
        let address = format!("127.0.0.1:{}", self.port);
        let channel = daemon::channel::tls(Leg::Api, &address, "localhost", roots);
        let token = fs::read_to_string(self.file("home/tokens/local")).expect("a token");
        let bearer = MetadataValue::try_from(format!("Bearer {}", token.trim())).expect("ascii");
        let mut request = Request::new(CreateNodeTokenRequest { node: "n1".into(), ttl_s: 0 });
        request.metadata_mut().insert("authorization", bearer);
        let mut client = EnrolmentServiceClient::new(channel.expect("a name"));
        client.create_node_token(request).await.expect("a token");
    }

    /// Returns all checks.
    async fn checks(&self) -> Vec<Check> {
        doctor::run(&self.file("controller.toml"), &self.file("timedatectl")).await.checks
    }
}

impl Patient for Controller {
    fn programs(&self) -> String {
        self.text("")
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        vec![("ROOT", self.text("")), ("DATA", self.text("data"))]
    }

    /// Returns what is wrong, but that nothing listens.
    async fn findings(&self) -> Vec<Check> {
        let wrong = self.checks().await.into_iter().filter(|check| check.state != State::Ok);
        wrong.filter(|check| check.name != "api").collect()
    }

    /// Runs a remedy: commands between semicolons, of the controller or of the shell. What systemd does is
    /// left out.
    async fn run(&self, remedy: &str) {
        for line in remedy.split("; ") {
            if line.starts_with("systemctl ") {
                continue;
            }
            if !line.starts_with("pve-sandbox-controller ") {
                self.sh(line);
                continue;
            }
            command(line).execute().await.expect(line);
        }
    }
}

fn command(line: &str) -> Command {
    let definition = Command::augment_subcommands(clap::Command::new("pve-sandbox-controller"));
    let matches = definition.try_get_matches_from(line.split_whitespace());
    Command::from_arg_matches(&matches.expect(line)).expect(line)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_a_controller_is_found_and_mended() {
    assert_root();
    let controller = Controller::new().await;
    assert_eq!(controller.findings().await, []);
    controller.is_mended("ca", "chmod 644 $DATA/ca/ca.key").await;
    controller.is_mended("certificate", "rm $DATA/ca/controller.crt").await;
    controller.is_mended("certificate", "echo nonsense >$DATA/ca/controller.crt").await;
    controller.is_mended("certificate", "cp $DATA/ca/ca.key $DATA/ca/controller.key").await;
    controller.is_mended("ca", "chmod 640 $DATA/ca/ca.key").await;
    controller.is_mended("ingress-ca", "chmod 644 $DATA/ca/ingress-ca.key").await;
    controller.is_mended("clock", "touch $ROOT/unsynchronised").await;

    // The only token with all scopes is revoked.
    let token = fs::read_to_string(controller.file("home/tokens/local")).expect("a token");
    let (id, _) = proto::token::split(token.trim()).expect("a token");
    let data = controller.text("data");
    controller.run(&format!("pve-sandbox-controller token revoke {id} --data-dir {data}")).await;
    controller.is_mended("tokens", "true").await;

    let about = fs::metadata(controller.file("data")).expect("there");
    controller.is_mended("owner", "chown 12345 $DATA/ca/ca.crt").await;
    let now = fs::metadata(controller.file("data/ca/ca.crt")).expect("there");
    assert_eq!(now.uid(), about.uid());

    // A damaged database: the earlier backup is put back.
    let (database, backup) = (controller.text("data/controller.db"), controller.text("backup"));
    controller.run(&format!("cp -a {data} {backup}; rm -f {database}-wal {database}-shm")).await;
    controller.run(&format!("printf nonsense | dd of={database} conv=notrunc status=none")).await;
    let found = controller.findings().await;
    assert_eq!((found.len(), found[0].name), (1, "database"), "{found:?}");
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("restore a backup")));
    controller.run(&format!("rm -r {data}; cp -a {backup} {data}")).await;
    assert_eq!(controller.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_or_foreign_half_of_each_ca_is_found_and_replaced_by_its_remedy() {
    let controller = Controller::new().await;
    let init = format!("pve-sandbox-controller init --data-dir {}", controller.text("data"));
    for ca in ["ca", "ingress-ca", "client-ca"] {
        let file = |end: &str| format!("$DATA/ca/{ca}.{end}");
        for breaks in [
            format!("rm {}", file("crt")),
            format!("rm {}", file("key")),
            format!("rm {} {}", file("crt"), file("key")),
            format!("cp $DATA/ca/controller.key {}", file("key")),
        ] {
            let own = fs::read(controller.file("data/ca/controller.crt")).expect("there");
            controller.sh(&breaks);
            let found = controller.findings().await;
            let finding = found.iter().find(|check| check.name == ca);
            let finding = finding.unwrap_or_else(|| panic!("{breaks}: {found:?}"));
            let remedy = finding.remedy.clone().expect("a remedy");
            // A CA of callers that was never there is made at a start.
            if ca == "client-ca" && breaks.contains("crt") && breaks.contains("key") {
                assert_eq!(finding.state, State::Warning, "{breaks}");
                assert_eq!(remedy, "systemctl restart pve-sandbox-controller");
                ca::complete(&controller.file("data")).expect("made");
                assert_eq!(controller.findings().await, [], "{breaks}");
                continue;
            }
            assert_eq!(finding.state, State::Failed, "{breaks}");
            // Nobody trusts what `init` would make in its place.
            let error = command(&init).execute().await.expect_err(&breaks);
            assert!(error.to_string().contains(&format!("/{ca}.")), "{breaks}: {error}");
            let now = fs::read(controller.file("data/ca/controller.crt")).expect("there");
            assert_eq!(now, own, "{breaks}");
            let (choice, commands) = remedy.split_once(": ").expect("a choice");
            assert!(
                choice.starts_with("restore both files of the CA from a backup; or"),
                "{remedy}"
            );
            controller.run(commands).await;
            assert_eq!(controller.findings().await, [], "{breaks}, and {remedy}");
        }
    }
    controller.is_mended("client-ca", "chmod 666 $DATA/ca/client-ca.key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn init_is_in_the_audit_log() {
    let controller = Controller::new().await;
    let data = controller.text("data");
    let entries = || {
        let text = fs::read_to_string(controller.file("data/audit/local.jsonl")).expect("entries");
        text.lines().filter(|line| line.contains("\"LocalInit\"")).count()
    };
    let before = entries();
    let init = format!("pve-sandbox-controller init --name new.test --data-dir {data}");
    command(&init).execute().await.expect("made");
    assert_eq!(entries(), before + 2, "its begin and its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_config_looks_at_the_files_that_the_configuration_names() {
    let controller = Controller::new().await;
    let file = controller.file("controller.toml");
    let check = async || {
        command(&format!("pve-sandbox-controller check-config {}", file.display())).execute().await
    };
    check().await.expect("all is there");
    let text = fs::read_to_string(&file).expect("read");
    let [cert, key] = ["api.crt", "api.key"].map(|name| controller.text(name));
    fs::write(&file, format!("{text}\n[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n"))
        .expect("written");
    check().await.expect_err("there is no such certificate");
    fs::write(&file, &text).expect("written");
    check().await.expect("all is there again");
    controller.sh("mv $DATA $ROOT/away");
    check().await.expect_err("there is no such directory");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_configuration_and_database_are_made_by_setup() {
    let controller = Controller::new().await;
    for (name, breaks) in
        [("configuration", "rm $ROOT/controller.toml"), ("database", "rm $DATA/controller.db*")]
    {
        controller.sh(breaks);
        let found = controller.findings().await;
        let [one] = &found[..] else { panic!("{breaks}: {found:?}") };
        assert_eq!((one.name, one.found.as_str()), (name, "not there"));
        // It makes them in the usual places; here these are others.
        assert_eq!(one.remedy.as_deref(), Some("pve-sandbox-controller setup"));
        controller.set_up().await;
        assert_eq!(controller.findings().await, [], "{breaks}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_the_public_certificate_is_found_and_mended() {
    let controller = Controller::new().await;
    let made = rcgen::generate_simple_self_signed(vec!["api.test".to_owned()]).expect("made");
    let renew = || {
        fs::write(controller.file("api.crt"), made.cert.pem()).expect("written");
        fs::write(controller.file("api.key"), made.signing_key.serialize_pem()).expect("written");
    };
    renew();
    let (file, [cert, key]) = (
        controller.file("controller.toml"),
        ["api.crt", "api.key"].map(|name| controller.text(name)),
    );
    let text = fs::read_to_string(&file).expect("read");
    let tls = format!("{text}\n[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n");
    fs::write(&file, tls).expect("written");
    controller.sh("chmod 600 $ROOT/api.key");
    assert_eq!(controller.findings().await, []);
    controller.is_mended("public-certificate", "chmod 644 $ROOT/api.key").await;
    for breaks in ["cp $DATA/ca/ca.key $ROOT/api.key", "rm $ROOT/api.crt"] {
        controller.sh(breaks);
        let found = controller.findings().await;
        let [one] = &found[..] else { panic!("{breaks}: {found:?}") };
        assert_eq!(one.name, "public-certificate");
        let remedy = one.remedy.as_deref().unwrap_or_default();
        assert!(remedy.starts_with("renew it where it comes from"), "{remedy}");
        renew();
        assert_eq!(controller.findings().await, [], "{breaks}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_name_and_example_domain_are_warnings_with_a_remedy() {
    let controller = Controller::new().await;
    let data = controller.file("data");
    let host = nix::unistd::gethostname().expect("a name").into_string().expect("text");
    if host != "localhost" {
        // A certificate without the names of this machine, as `init` makes it.
        fs::remove_file(data.join("ca/controller.crt")).expect("removed");
        ca::init(&data, &[]).expect("made");
        let found = controller.findings().await;
        assert_eq!((found.len(), found[0].name), (1, "names"), "{found:?}");
        controller.is_mended("names", "true").await;
    }
    let file = controller.file("controller.toml");
    let text = fs::read_to_string(&file).expect("read");
    fs::write(&file, text.replace("sandbox.test", "sandbox.example.com")).expect("written");
    let found = controller.findings().await;
    assert_eq!((found.len(), found[0].name), (1, "url-template"), "{found:?}");
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("--domain")));
    fs::write(&file, &text).expect("written");
    assert_eq!(controller.findings().await, []);
    fs::write(&file, format!("{text}\n[create]\ncandidate_probes = 9\n")).expect("written");
    let found = controller.findings().await;
    assert_eq!((found.len(), found[0].name), (1, "configuration"), "{found:?}");
    assert!(found[0].found.contains("candidate_probes"), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_controller_is_found_until_it_is_started() {
    let controller = Controller::new().await;
    let file = controller.file("controller.toml");
    let api = async || {
        let checks = controller.checks().await;
        checks.into_iter().find(|check| check.name == "api").expect("looked at")
    };
    let stopped = api().await;
    assert_eq!(stopped.state, State::Failed);
    assert!(stopped.remedy.is_some_and(|text| text.starts_with("systemctl enable --now")));
    // Something else on its port.
    let other = tokio::net::TcpListener::bind(("127.0.0.1", controller.port)).await.expect("free");
    let silent = tokio::spawn(async move { other.accept().await.map(drop) });
    let taken = api().await;
    assert!(taken.remedy.as_deref().is_some_and(|text| text.starts_with("ss -ltnp")), "{taken:?}");
    silent.await.expect("ended").expect("accepted");
    let run = command(&format!("pve-sandbox-controller run --config {}", file.display()));
    let serves = async {
        while api().await.state != State::Ok {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let served = tokio::time::timeout(Duration::from_secs(20), serves);
    tokio::select! {
        ended = run.execute() => panic!("it ended: {ended:?}"),
        served = served => served.expect("it serves"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn controller_whose_place_a_later_one_has_taken_is_found() {
    let controller = Controller::new().await;
    let api = async || {
        let checks = controller.checks().await;
        checks.into_iter().find(|check| check.name == "api").expect("looked at")
    };
    let until = async |state: State| {
        let reached = async {
            while api().await.state != state {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reached).await.expect("in time");
    };
    let replaced = async {
        until(State::Ok).await;
        // The later one works on the same database; the first one finds that out when it writes.
        let later = Sqlite::open(&controller.file("data/controller.db")).expect("opened");
        later.claim().await.expect("claimed");
        controller.make_a_node_token().await;
        until(State::Failed).await;
        let found = api().await;
        assert!(found.found.contains("later controller"), "{found:?}");
    };
    let config = controller.text("controller.toml");
    let run = command(&format!("pve-sandbox-controller run --config {config}"));
    tokio::select! {
        ended = run.execute() => panic!("it ended: {ended:?}"),
        () = replaced => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_the_ssh_server_is_found_and_mended() {
    assert_root();
    let controller = Controller::new().await;
    let file = controller.file("controller.toml");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    drop(listener);
    let text = fs::read_to_string(&file).expect("read");
    let text = format!("{text}\n[ssh]\nlisten = \"0.0.0.0:{port}\"\n");
    fs::write(&file, &text).expect("written");
    let config = file.display();
    controller.run(&format!("pve-sandbox-controller setup --config {config} --no-start")).await;
    let ssh = async || {
        let checks = controller.checks().await;
        checks.into_iter().find(|check| check.name == "ssh").expect("looked at")
    };
    let stopped = ssh().await;
    assert_eq!(stopped.state, State::Failed);
    assert!(stopped.remedy.is_some_and(|text| text.starts_with("systemctl restart")));
    let other = tokio::net::TcpListener::bind(("0.0.0.0", port)).await.expect("free");
    let silent = tokio::spawn(async move { other.accept().await.map(drop) });
    let taken = ssh().await;
    assert!(taken.remedy.as_deref().is_some_and(|text| text.starts_with("ss -ltnp")), "{taken:?}");
    silent.await.expect("ended").expect("accepted");
    let run = command(&format!("pve-sandbox-controller run --config {config}"));
    let flaws = async {
        while ssh().await.state != State::Ok {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let key = "$DATA/ssh_host_ed25519_key";
        controller.is_mended("ssh-host-key", &format!("chmod 640 {key}")).await;
        controller.is_mended("ssh-host-key", &format!("rm {key}")).await;
        controller.is_mended("owner", &format!("chown 12345 {key}")).await;
        fs::write(controller.file("data/ssh_host_ed25519_key"), "nonsense").expect("written");
        let found = controller.findings().await;
        assert_eq!((found.len(), found[0].name), (1, "ssh-host-key"), "{found:?}");
        let remedy = found[0].remedy.as_deref().unwrap_or_default();
        assert!(remedy.starts_with("restore it from a backup; without one: rm "), "{remedy}");
        let (_, make) = remedy.split_once("without one: ").expect("a remedy");
        controller.run(make).await;
        assert_eq!(controller.findings().await, []);
        fs::write(&file, format!("{text}host = \"localhost\"\n")).expect("written");
        let found = controller.findings().await;
        assert_eq!((found.len(), found[0].name), (1, "ssh-address"), "{found:?}");
        assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("host = ")));
        fs::write(&file, &text).expect("written");
        assert_eq!(controller.findings().await, []);
    };
    let mended = tokio::time::timeout(Duration::from_secs(60), flaws);
    tokio::select! {
        ended = run.execute() => panic!("it ended: {ended:?}"),
        mended = mended => mended.expect("in time"),
    }
}

/// The lines that `setup` and `ca rotate` print are run by a shell, with stand-ins for the two programs.
#[test]
fn printed_loop_gives_each_node_a_line_of_its_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let program = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    };
    // A node that gets no token is not touched.
    program("sandboxctl", "[ \"$3\" != pve3 ] || exit 1; echo \"echo joined $3\"");
    program("ssh", "echo \"to $5 as $2 in $4\"; shift 5; exec \"$@\"");
    let host = |node: &str, address: Option<&str>| setup::Host {
        node: node.parse().expect("a name"),
        address: address.map(|address| address.parse().expect("an address")),
    };
    let others =
        [host("pve2", Some("192.0.2.12")), host("pve3", Some("2001:db8::3")), host("pve4", None)];
    let own = "pve1".parse().expect("a name");
    let script = setup::join_loop(Some(&own), &others).join("\n");
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    let done = Process::new("/bin/sh").args(["-c", &script]).env("PATH", path).output();
    let done = done.expect("a shell");
    assert!(done.status.success(), "{done:?}");
    let to = |node: &str, address: &str| {
        format!(
            "to root@{address} as HostKeyAlias={node} in UserKnownHostsFile=/root/.ssh/known_hosts \
             /etc/pve/nodes/{node}/ssh_known_hosts\n"
        )
    };
    assert_eq!(
        String::from_utf8_lossy(&done.stdout),
        [
            "joined pve1\n",
            &to("pve2", "192.0.2.12"),
            "joined pve2\n",
            &to("pve3", "2001:db8::3"),
            &to("pve4", "pve4"),
            "joined pve4\n"
        ]
        .concat()
    );
    assert_eq!(setup::join_loop(None, &[]), [""; 0]);
}
