//! Further inputs: bytes that go into a running sandbox by other ways than a stream of a command, and the
//! secrets that the product makes for callers.

use prost::Message as _;
use proto::sandbox::v1::{
    AccessKind, ArchiveStart, Argv, CreateAccessLinkRequest, CreateNodeTokenRequest, ExecRequest,
    ExecStart, ExposeHttpServiceRequest, ForwardOpen, ForwardRequest, ForwardTcp, JoinRequest,
    UploadArchiveRequest, Visibility, WriteExecStdinRequest,
    enrolment_service_client::EnrolmentServiceClient, exec_request, exec_response, exec_start,
    forward_open, forward_request, forward_response, upload_archive_request,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc,
    time::timeout,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use crate::{
    Api, DEADLINE, KILL, bearer, look_around,
    search::{Input, Log, Place, Search},
    until_holds,
    world::World,
};

/// Sends every further input to a running sandbox, and looks around while each is on its way.
pub(crate) async fn send(search: &mut Search, world: &World, log: &Log, api: &mut Api, id: &str) {
    written_stdin(search, world, log, api, id).await;
    archive(world, api, id).await;
    forward(search, world, log, api, id).await;
    access_link(search, api, id).await;
    join_token(search, world).await;
    look_around(search, world, log);
}

/// Writes to the stdin of a command that runs, by a call of its own.
async fn written_stdin(search: &mut Search, world: &World, log: &Log, api: &mut Api, id: &str) {
    let path = world.dir.join("inside/written-stdin");
    let line = format!("cat > {}; sleep 600; :", path.display());
    let argv = Argv { args: ["/bin/sh", "-c", &line].map(str::to_owned).into() };
    let start = ExecStart {
        id: id.to_owned(),
        exec_id: "run-2".into(),
        command: Some(exec_start::Command::Argv(argv)),
        ..ExecStart::default()
    };
    let (requests, asked) = mpsc::channel(8);
    let say = async |message| {
        requests.send(ExecRequest { message: Some(message) }).await.expect("taken");
    };
    say(exec_request::Message::Start(start)).await;
    let answers = api.exec(ReceiverStream::new(asked)).await.expect("it starts");
    let mut answers = answers.into_inner();
    let begun = answers.message().await.expect("an answer").expect("an answer").message;
    assert!(matches!(begun, Some(exec_response::Message::Started(_))), "{begun:?}");
    let write = WriteExecStdinRequest {
        id: id.to_owned(),
        exec_id: "run-2".into(),
        offset: 0,
        data: Input::WrittenStdin.canary().into(),
        eof: true,
    };
    api.write_exec_stdin(write).await.expect("written");
    until_holds(&path, &Input::WrittenStdin.canary()).await;
    look_around(search, world, log);
    say(exec_request::Message::Signal(KILL)).await;
    let ended = async {
        while let Some(answer) = answers.message().await.expect("an answer") {
            if matches!(answer.message, Some(exec_response::Message::Exit(_))) {
                return;
            }
        }
        panic!("the command has no end");
    };
    timeout(DEADLINE, ended).await.expect("it ends");
}

/// Archive of one file.
fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name);
    for (at, number) in [(100, 0o600), (108, 0), (116, 0)] {
        put(at, &format!("{number:07o}"));
    }
    put(124, &format!("{:011o}", content.len()));
    put(136, &format!("{:011o}", 0));
    // Checksum of a header that has blanks in its place; then the kind, which is a file.
    put(148, "        0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut archive = [header.as_slice(), content].concat();
    archive.resize(archive.len().next_multiple_of(512) + 1024, 0);
    archive
}

/// Uploads an archive with a file.
async fn archive(world: &World, api: &mut Api, id: &str) {
    let dir = world.dir.join("inside/unpacked");
    let path = dir.to_str().expect("UTF-8").to_owned();
    let start = ArchiveStart { id: id.to_owned(), path, ..ArchiveStart::default() };
    let bytes = tar("secret", Input::Archive.canary().as_bytes());
    let messages = [
        upload_archive_request::Message::Start(start),
        upload_archive_request::Message::Data(bytes.into()),
    ];
    let messages = messages.map(|message| UploadArchiveRequest { message: Some(message) });
    api.upload_archive(tokio_stream::iter(messages)).await.expect("unpacked");
    until_holds(&dir.join("secret"), &Input::Archive.canary()).await;
}

/// Sends bytes to a server inside, and gets them back from it.
async fn forward(search: &mut Search, world: &World, log: &Log, api: &mut Api, id: &str) {
    // This machine is the sandbox.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let server = tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.expect("a connection");
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).await.expect("read");
        connection.write_all(&bytes).await.expect("written");
    });
    let tcp = ForwardTcp { host: "127.0.0.1".into(), port: port.into() };
    let target = Some(forward_open::Target::Tcp(tcp));
    let messages = [
        forward_request::Message::Open(ForwardOpen { id: id.to_owned(), target }),
        forward_request::Message::Data(Input::Forward.canary().into()),
        forward_request::Message::Eof(true),
    ];
    let messages = messages.map(|message| ForwardRequest { message: Some(message) });
    let answers = api.forward(tokio_stream::iter(messages)).await.expect("open");
    let mut answers = answers.into_inner();
    let mut back = Vec::new();
    let echoed = async {
        while let Some(answer) = answers.next().await {
            let said = answer.expect("a message").message;
            if let Some(forward_response::Message::Data(data)) = said {
                back.extend_from_slice(&data);
            }
        }
    };
    timeout(DEADLINE, echoed).await.expect("it ends");
    assert_eq!(back, Input::Forward.canary().as_bytes());
    server.await.expect("no panic");
    look_around(search, world, log);
}

/// Makes a credential for an open port.
async fn access_link(search: &mut Search, api: &mut Api, id: &str) {
    let expose = ExposeHttpServiceRequest {
        id: id.to_owned(),
        name: "web".into(),
        port: 8080,
        visibility: Visibility::Token.into(),
    };
    api.expose_http_service(expose).await.expect("open");
    let link = CreateAccessLinkRequest {
        id: id.to_owned(),
        service: "web".into(),
        kind: AccessKind::Token.into(),
        ttl: None,
    };
    let made = api.create_access_link(link).await.expect("made").into_inner();
    assert!(!made.credential.is_empty());
    search.add(Input::AccessLink, &made.credential);
    // Whatever is told of the sandbox later has it no more.
    let sandbox = crate::until(api, id, |_| true).await;
    search.look(Place::Lists, &sandbox.encode_to_vec());
}

/// Makes the one-time token of a node, and joins with it in vain.
async fn join_token(search: &mut Search, world: &World) {
    let mut operator =
        EnrolmentServiceClient::with_interceptor(world.channel(), bearer(&world.token));
    let request = CreateNodeTokenRequest { node: "n2".into(), ttl_s: 0 };
    let token = operator.create_node_token(request).await.expect("made").into_inner().token;
    let (_, secret) = token.rsplit_once('_').expect("an id and a secret");
    search.add(Input::JoinToken, secret);
    let join = JoinRequest {
        token,
        node: "n2".into(),
        address: "192.0.2.2:7445".into(),
        agent_csr: "no request".into(),
        ..JoinRequest::default()
    };
    let mut node = EnrolmentServiceClient::new(world.channel());
    let refused = node.join(join).await.expect_err("no certificate");
    search.look(Place::Errors, format!("{refused} {refused:?}").as_bytes());
    search.look(Place::Errors, refused.details());
}
