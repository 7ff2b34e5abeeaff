//! Files of a sandbox.

use bytes::Bytes;
use futures_util::stream;
use proto::{Reason, sandbox::v1::*};
use tokio_stream::StreamExt;

use super::*;
use crate::node::fake::counted;

fn content(path: &str, bytes: &[u8]) -> FileContent {
    FileContent { path: path.into(), content: Bytes::copy_from_slice(bytes), mode: 0o600 }
}

fn write(id: &str, files: Vec<FileContent>) -> WriteFilesRequest {
    WriteFilesRequest { id: id.into(), files, user: String::new() }
}

fn read(id: &str, path: &str) -> ReadFileRequest {
    ReadFileRequest { id: id.into(), path: path.into(), ..ReadFileRequest::default() }
}

#[tokio::test(start_paused = true)]
async fn files_are_written_and_read() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let (vmid, mut api) = (sandbox.vmid.to_string(), lab.api());
    let bytes = counted(1_000_000);
    let files = vec![content("/srv/a", &bytes), content("/srv/b", b"b")];
    let written = api.write_files(write(&vmid, files)).await.expect("written").into_inner();
    assert_eq!(written.written, 2);

    let part = ReadFileRequest { offset: 10, length: 700_000, ..read(&sandbox.id, "/srv/a") };
    let mut pieces = api.read_file(part).await.expect("read").into_inner();
    let first = pieces.next().await.expect("a piece").expect("no error");
    let file = first.file.expect("what it is comes first");
    assert_eq!((file.name.as_str(), file.size, file.mode), ("a", 1_000_000, 0o600));
    let mut got = first.data.to_vec();
    while let Some(piece) = pieces.next().await {
        let piece = piece.expect("no error");
        assert!(piece.file.is_none(), "and once");
        got.extend_from_slice(&piece.data);
    }
    assert!(got == bytes[10..700_010]);

    let path = |path: &str| StatFileRequest {
        id: sandbox.id.clone(),
        path: path.into(),
        user: String::new(),
    };
    let file = api.stat_file(path("/srv/b")).await.expect("there").into_inner().file;
    assert_eq!(file.expect("a file").size, 1);
    assert_eq!(reason(api.stat_file(path("/srv/c")).await), Reason::FileNotFound);
    assert_eq!(reason(api.read_file(read(&vmid, "/srv/c")).await), Reason::FileNotFound);
    let list = ListDirRequest { id: vmid.clone(), path: "/srv".into(), ..Default::default() };
    let entries = api.list_dir(list).await.expect("listed").into_inner().entries;
    assert_eq!(entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    let remove = RemoveFileRequest {
        id: vmid.clone(),
        path: "/srv/b".into(),
        ..RemoveFileRequest::default()
    };
    for existed in [true, false] {
        let answer = api.remove_file(remove.clone()).await.expect("removed").into_inner();
        assert_eq!(answer.existed, existed);
    }
}

#[tokio::test(start_paused = true)]
async fn write_that_fails_midway_tells_what_is_written() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let (id, mut api) = (sandbox.id.clone(), lab.api());
    let files = ["/a", "/b", "/srv/unwritable", "/c"].map(|path| content(path, b"new"));
    let status = api.write_files(write(&id, files.into())).await.expect_err("refused");
    let (reason, metadata) = daemon::status::info(&status).expect("ours");
    assert_eq!(reason, "FILE_REFUSED");
    assert_eq!(metadata["files_written"], "2");
    assert_eq!(metadata["failed_path"], "/srv/unwritable");
    let stat =
        |path: &str| StatFileRequest { id: id.clone(), path: path.into(), ..Default::default() };
    api.stat_file(stat("/b")).await.expect("written");
    assert_eq!(super::reason(api.stat_file(stat("/c")).await), Reason::FileNotFound);
}

#[tokio::test(start_paused = true)]
async fn invalid_file_is_named_by_its_index() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let mode = FileContent { mode: 0o10000, ..content("/a", b"") };
    for (bad, field) in [(content("srv", b""), "files[1].path"), (mode, "files[1].mode")] {
        let files = vec![content("/ok", b""), bad];
        let status = lab.api().write_files(write(&sandbox.id, files)).await.expect_err("invalid");
        // The same as in the details: see `daemon::status`.
        assert!(status.message().starts_with(&format!("{field} must")), "{status:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_out_of_bounds_reach_no_node() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let (id, mut api) = (sandbox.id.clone(), lab.api());
    let long = format!("/{}", "x".repeat(4095));
    for path in ["", "a", "/a\0", "/a/", long.as_str()] {
        let bad = write(&id, vec![content("/ok", b""), content(path, b"")]);
        assert_eq!(reason(api.write_files(bad).await), Reason::FieldInvalid, "{path}");
    }
    let mode = FileContent { mode: 0o10000, ..content("/a", b"") };
    for bad in [vec![], vec![content("/a", b""); 1001], vec![mode]] {
        assert_eq!(reason(api.write_files(write(&id, bad)).await), Reason::FieldInvalid);
    }
    let large = vec![content("/a", &vec![0; 800 * 1024]); 2];
    assert_eq!(reason(api.write_files(write(&id, large)).await), Reason::FieldInvalid);
    assert_eq!(reason(api.read_file(read(&id, "etc")).await), Reason::FieldInvalid);
    for path in ["/", "//", "/./"] {
        let root = RemoveFileRequest { id: id.clone(), path: path.into(), ..Default::default() };
        assert_eq!(reason(api.remove_file(root).await), Reason::FieldInvalid, "{path}");
    }

    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut blue = lab.api_as(&blue);
    let foreign = blue.write_files(write(&id, vec![content("/a", b"")])).await;
    assert_eq!(reason(foreign), Reason::SandboxNotFound);
    assert_eq!(reason(blue.read_file(read(&id, "/a")).await), Reason::SandboxNotFound);
    let none = StatFileRequest { id: id.clone(), path: "/ok".into(), user: String::new() };
    assert_eq!(reason(api.stat_file(none).await), Reason::FileNotFound, "all or nothing");
}

fn upload(id: &str, path: &str) -> UploadArchiveRequest {
    let start = ArchiveStart { id: id.into(), path: path.into(), ..ArchiveStart::default() };
    UploadArchiveRequest { message: Some(upload_archive_request::Message::Start(start)) }
}

fn data(bytes: &[u8]) -> UploadArchiveRequest {
    let bytes = Bytes::copy_from_slice(bytes);
    UploadArchiveRequest { message: Some(upload_archive_request::Message::Data(bytes)) }
}

#[tokio::test(start_paused = true)]
async fn archives_are_uploaded_and_downloaded() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let (id, mut api) = (sandbox.id.clone(), lab.api());
    let bytes = counted(5_000_000);
    let parts = bytes.chunks(200_000).map(data);
    let input: Vec<_> = std::iter::once(upload(&id, "/srv")).chain(parts).collect();
    let answer = api.upload_archive(stream::iter(input)).await.expect("unpacked").into_inner();
    assert_eq!(answer.entries, 1);
    let download =
        DownloadArchiveRequest { id: id.clone(), path: "/srv".into(), user: String::new() };
    let mut pieces = api.download_archive(download.clone()).await.expect("packed").into_inner();
    // Read slowly: the data in flight is bounded.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut got = Vec::new();
    while let Some(piece) = pieces.next().await {
        got.extend_from_slice(&piece.expect("no error").data);
    }
    assert!(got == bytes);
    let none = DownloadArchiveRequest { path: "/none".into(), ..download };
    assert_eq!(reason(api.download_archive(none).await), Reason::FileNotFound);

    let no_start = stream::iter([data(b"x")]);
    assert_eq!(reason(api.upload_archive(no_start).await), Reason::FieldInvalid);
    for wrong in [upload(&id, "/srv"), data(&vec![0; 256 * 1024 + 1])] {
        let input = stream::iter([upload(&id, "/half"), data(b"x"), wrong]);
        assert_eq!(reason(api.upload_archive(input).await), Reason::FieldInvalid);
    }
    let start = ArchiveStart {
        owner: "a b".into(),
        id: id.clone(),
        path: "/a".into(),
        ..Default::default()
    };
    let start = Some(upload_archive_request::Message::Start(start));
    let input = stream::iter([UploadArchiveRequest { message: start }]);
    assert_eq!(reason(api.upload_archive(input).await), Reason::FieldInvalid);
    let silent = stream::iter([upload(&id, "/half"), data(b"x")]).chain(stream::pending());
    assert_eq!(reason(api.upload_archive(silent).await), Reason::OutcomeUnknown);
    lab.holder(&id).down();
    let away = api.upload_archive(stream::iter([upload(&id, "/srv"), data(b"x")])).await;
    assert!([Reason::NodeUnreachable, Reason::OutcomeUnknown].contains(&reason(away)));
}
