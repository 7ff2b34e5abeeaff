//! Inputs that come by SSH: variables of a session, the line and the stdin of a command, and a file by SFTP, with its
//! name. The client is OpenSSH's. It logs in with a key, so there is no password.

#![expect(clippy::disallowed_methods, reason = "OpenSSH's clients are processes")]

use std::{path::PathBuf, process::Stdio};

use prost::Message as _;
use proto::sandbox::v1::{
    AddSshKeyRequest, ListExecsRequest, operator_service_client::OperatorServiceClient,
};
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

use crate::{
    Api, DEADLINE, bearer, look_around,
    search::{Input, Log, Place, Search},
    until_holds,
    world::World,
};

/// A client with a key of its own. What it sends is in its files: its command lines are looked at, too.
struct Client {
    dir: PathBuf,
    /// User and host: the sandbox's id is the user.
    place: String,
}

impl Client {
    async fn new(world: &World, id: &str) -> Self {
        let client = Self { dir: world.dir.join("client"), place: format!("{id}@127.0.0.1") };
        std::fs::create_dir(&client.dir).expect("made");
        let key = client.text("key");
        let keygen = ["-q", "-t", "ed25519", "-N", "", "-f", &key];
        run(Command::new("ssh-keygen").args(keygen)).await;
        let public_key = std::fs::read_to_string(client.dir.join("key.pub")).expect("a key");
        let mut operator =
            OperatorServiceClient::with_interceptor(world.channel(), bearer(&world.token));
        let name = "laptop".into();
        let add = AddSshKeyRequest { name, public_key, ..AddSshKeyRequest::default() };
        operator.add_ssh_key(add).await.expect("added");
        let port = world.serve_ssh().await;
        // The second variable is not passed on.
        let (env, refused) = (Input::SshEnv.canary(), Input::Refused.canary());
        let config = format!(
            "Port {port}\nIdentityFile {key}\nIdentitiesOnly yes\nIdentityAgent none\nBatchMode yes\n\
             StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\n\
             LogLevel ERROR\nSetEnv LC_SECRET={env} SECRET={refused}\n"
        );
        client.write("config", &config);
        client
    }

    fn text(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.join(name), text).expect("written");
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(self.dir.join("config")).kill_on_drop(true);
        command
    }
}

/// Runs a program to its end.
async fn run(command: &mut Command) {
    command.kill_on_drop(true).stdin(Stdio::null());
    let ran = timeout(DEADLINE, command.output()).await.expect("in time");
    let ran = ran.expect("openssh-client is installed");
    assert!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// Sends every input that comes by SSH to a running sandbox, and looks around while each is on its way.
pub(crate) async fn send(search: &mut Search, world: &World, log: &Log, api: &mut Api, id: &str) {
    let client = Client::new(world, id).await;
    command(search, world, log, api, (&client, id)).await;
    file(world, &client).await;
    look_around(search, world, log);
}

/// Runs a command, which writes down a variable and its stdin.
async fn command(
    search: &mut Search,
    world: &World,
    log: &Log,
    api: &mut Api,
    (client, id): (&Client, &str),
) {
    let inside = world.dir.join("inside");
    let (env, stdin) = (inside.join("ssh-env"), inside.join("ssh-stdin"));
    let line = format!(
        ": {}; printf %s \"$LC_SECRET$SECRET\" > {}; cat > {}",
        Input::SshLine.canary(),
        env.display(),
        stdin.display()
    );
    let mut ssh = client.command("ssh");
    ssh.args([&client.place, &line]).stdin(Stdio::piped());
    let mut ssh = ssh.spawn().expect("openssh-client is installed");
    let mut input = ssh.stdin.take().expect("a pipe");
    input.write_all(Input::SshStdin.canary().as_bytes()).await.expect("sent");
    until_holds(&env, &Input::SshEnv.canary()).await;
    until_holds(&stdin, &Input::SshStdin.canary()).await;
    look_around(search, world, log);
    let list = ListExecsRequest { id: id.to_owned(), ..ListExecsRequest::default() };
    let list = api.list_execs(list).await.expect("listed").into_inner();
    search.look(Place::Lists, &list.encode_to_vec());
    drop(input);
    let ended = timeout(DEADLINE, ssh.wait()).await.expect("in time").expect("ended");
    assert!(ended.success(), "{ended}");
}

/// Writes a file by SFTP. A batch names it.
async fn file(world: &World, client: &Client) {
    let there = world.dir.join("inside").join(Input::SftpName.canary());
    client.write("file", &Input::SftpFile.canary());
    client.write("batch", &format!("put {} {}\n", client.text("file"), there.display()));
    let mut sftp = client.command("sftp");
    run(sftp.args(["-q", "-b", &client.text("batch"), &client.place])).await;
    until_holds(&there, &Input::SftpFile.canary()).await;
}
