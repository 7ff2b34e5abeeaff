//! Tests of `cp`, in both directions, and of hostile archives.

use crate::fake::{Behaviour, Fake, ID};

#[tokio::test]
async fn cp_copies_files_and_directories_both_ways() {
    let fake = Fake::start(Behaviour::default()).await;
    let dir = tempfile::tempdir().expect("tempdir");
    let path = |name: &str| dir.path().join(name).to_str().expect("utf-8").to_owned();
    std::fs::create_dir_all(dir.path().join("src/deep")).expect("made");
    std::fs::write(dir.path().join("src/deep/a"), "deep").expect("written");
    let large = vec![7_u8; 1_000_000];
    std::fs::write(dir.path().join("src/large"), &large).expect("written");
    fake.behaviour.files.put("/srv/there", "there");

    for (from, to) in [("src", "/srv"), ("src", "/new"), ("src/.", "/srv"), ("src/large", "/srv/l")]
    {
        let ran = fake.run(&["cp", &path(from), &format!("{ID}:{to}")]).await;
        assert_eq!((ran.code, ran.text(), ran.stderr.as_str()), (Some(0), "", ""), "{from} {to}");
    }
    {
        let files = fake.behaviour.files.all();
        let names: Vec<_> = files.keys().map(String::as_str).collect();
        let wanted = [
            "/new/deep/a",
            "/new/large",
            "/srv/deep/a",
            "/srv/l",
            "/srv/large",
            "/srv/src/deep/a",
            "/srv/src/large",
            "/srv/there",
        ];
        assert_eq!(names, wanted);
        assert!(files["/srv/l"] == large);
    }
    let over = fake.run(&["cp", &path("src"), &format!("{ID}:/srv/there")]).await;
    assert_eq!(over.code, Some(2), "{over:?}");

    let ran = fake.run(&["cp", &format!("{ID}:/srv"), &path("back")]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(std::fs::read(dir.path().join("back/src/deep/a")).expect("there"), b"deep");
    let value = fake.run(&["cp", "--json", &format!("{ID}:/srv/there"), &path("")]).await.json();
    assert!(value["archive_bytes"].as_u64() > Some(512), "{value}");
    assert_eq!(std::fs::read(dir.path().join("there")).expect("there"), b"there");

    let missing = fake.run(&["cp", &format!("{ID}:/none"), &path("x")]).await;
    assert!(missing.code == Some(3) && missing.stderr.contains("(FILE_NOT_FOUND)"), "{missing:?}");
    assert_eq!(fake.run(&["cp", &path("none"), &format!("{ID}:/srv")]).await.code, Some(1));
    for (from, to) in [("a", "b"), ("100001:/a", "100001:/b"), ("-", "-"), ("a", "100001:b")] {
        assert_eq!(fake.run(&["cp", from, to]).await.code, Some(2), "{from} {to}");
    }
}

#[tokio::test]
async fn cp_passes_an_archive_through_unchanged() {
    let fake = Fake::start(Behaviour::default()).await;
    fake.behaviour.files.put("/srv/a", "one");
    let out = fake.run(&["cp", &format!("{ID}:/srv"), "-"]).await;
    assert_eq!(out.code, Some(0), "{out:?}");
    let ran = fake.run_with(&["cp", "-", &format!("{ID}:/copy")], &out.stdout).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(fake.behaviour.files.all()["/copy/srv/a"], b"one");
}
