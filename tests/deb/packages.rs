//! The packages as files, and the repository that hands them out: they are the same to the byte wherever they are
//! built, lintian finds nothing, their files have md5sums and none is a conffile, they have the pages that they name,
//! the bills of materials name what is linked, and apt takes them by their key alone.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use super::{
    built::{self, file},
    repository,
    root::{limited, said, target},
    steps::{AGENT, CLI, CONTROLLER},
    wanted,
};

/// Members of the workspace, with the packages that are made of them.
const MEMBERS: [(&str, &str); 3] = [("agent", AGENT), ("controller", CONTROLLER), ("cli", CLI)];
/// Runs a command in a copy of the checkout in $1 and of its programs of the profile $3: in the folder $2, under
/// another umask, with files that are new and that only their owner may read.
const ELSEWHERE: &str = r#"
umask 077
top=$1 copy=$2 profile=$3
shift 3
# tar ends with 1 when a file changes while it is read, as in a checkout that somebody edits.
{ tar -C "$top" --exclude=./target --exclude=./.git --exclude=node_modules -cf - . || [ $? -eq 1 ]; } |
  tar -C "$copy" --touch --no-same-permissions -xf -
mkdir -p "$copy/target/$profile"
ln -s "$top/target/tools" "$copy/target/tools"
cp "$top/target/$profile"/{pve-sandbox-agent,pve-sandbox-controller,sandboxctl} "$copy/target/$profile/"
cd "$copy"
exec "$@"
"#;

/// Returns the directory of this checkout.
fn top() -> PathBuf {
    target().parent().expect("the checkout").to_owned()
}

/// Runs a program to its end; returns exit code and output.
fn run(command: &mut Command) -> (Option<i32>, String) {
    said(&command.env("LC_ALL", "C").output().expect("started"))
}

/// Returns the cargo profile of the programs that are packed.
fn profile() -> String {
    env::var("PROFILE").unwrap_or_else(|_| "dist".to_owned())
}

/// Runs a script of packaging/ in a copy of the checkout, as `ELSEWHERE` says, in another time zone, with this
/// SOURCE_DATE_EPOCH or none. Returns the copy, whose folder has a name of its own for each test: what a killed run
/// left is removed first.
#[track_caller]
fn elsewhere(name: &str, argv: &[&str], epoch: Option<&str>) -> TempDir {
    let (all, profile) = (target().join("elsewhere"), profile());
    fs::create_dir_all(&all).expect("made");
    drop(fs::remove_dir_all(all.join(name)));
    let mut folder = tempfile::Builder::new();
    let copy = folder.prefix(name).rand_bytes(0).tempdir_in(all).expect("a folder");
    let mut command = limited(&["bash", "-euo", "pipefail", "-c", ELSEWHERE, "bash"]);
    command.arg(top()).arg(copy.path()).arg(&profile).args(argv).env("TZ", "XXX-13:30");
    command.env_remove("SOURCE_DATE_EPOCH");
    if let Some(epoch) = epoch {
        command.env("SOURCE_DATE_EPOCH", epoch);
    }
    let (code, text) = run(&mut command);
    assert_eq!(code, Some(0), "{argv:?} of the programs in target/{profile} (PROFILE): {text}");
    copy
}

/// Checks that what was built in a copy is what is in target/debian.
#[track_caller]
fn assert_same(copy: &TempDir, package: &str, end: &str) {
    let here = file(&built::dir(), package, end);
    let there = file(&copy.path().join("target/debian"), package, end);
    assert_eq!(here.file_name(), there.file_name());
    let read = |path: &Path| fs::read(path).expect("read");
    assert!(
        read(&here) == read(&there),
        "{} is another one elsewhere; or it was not built with PROFILE={}, as the copy was",
        here.display(),
        profile()
    );
}

#[test]
fn package_of_sandboxctl_is_the_same_wherever_it_is_built() {
    if !wanted() {
        return;
    }
    let copy = elsewhere("cli", &["packaging/build-debs.sh", "cli"], None);
    assert_same(&copy, CLI, ".deb");
}

#[test]
fn packages_of_the_daemons_are_the_same_wherever_they_are_built() {
    if !wanted() {
        return;
    }
    let words = ["packaging/build-debs.sh", "agent", "controller"];
    let copy = elsewhere("daemons", &words, Some("1"));
    for package in [AGENT, CONTROLLER] {
        assert_same(&copy, package, ".deb");
    }
}

#[test]
fn lintian_finds_nothing_in_the_packages() {
    if !wanted() {
        return;
    }
    for (_, package) in MEMBERS {
        let path = file(&built::dir(), package, ".deb");
        let lintian = |more: &[&str]| {
            let words = ["lintian", "--no-cfg", "--allow-root", "--fail-on", "error,warning"];
            run(limited(&words).args(more).arg(&path))
        };
        let (code, text) = lintian(&[]);
        assert_eq!(code, Some(0), "{package}: {text}");
        // It looks, and what is overridden is still there.
        let (code, text) = lintian(&["--no-override"]);
        assert!(code == Some(2) && text.contains("closes-no-bugs"), "{package}: {code:?}: {text}");
    }
}

/// Unpacks a package, with its control files in `DEBIAN`; returns the folder and the paths of all files in it.
#[track_caller]
fn unpacked(package: &str) -> (TempDir, BTreeSet<String>) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = file(&built::dir(), package, ".deb");
    let (code, text) = run(limited(&["dpkg-deb", "--raw-extract"]).arg(path).arg(dir.path()));
    assert_eq!(code, Some(0), "{package}: {text}");
    let mut find = limited(&["find", ".", "-type", "f", "-printf", "%P\n"]);
    let (code, text) = run(find.current_dir(&dir));
    assert_eq!(code, Some(0), "{package}: {text}");
    (dir, text.lines().map(str::to_owned).collect())
}

#[test]
fn packages_have_the_md5sums_of_all_files_and_no_conffiles() {
    if !wanted() {
        return;
    }
    for (_, package) in MEMBERS {
        let (dir, files) = unpacked(package);
        let control = |name: &str| fs::read_to_string(dir.path().join("DEBIAN").join(name));
        let sums = control("md5sums").unwrap_or_else(|error| panic!("{package}: {error}"));
        let mut check = limited(&["md5sum", "--check", "--strict", "--quiet", "DEBIAN/md5sums"]);
        assert_eq!(run(check.current_dir(&dir)), (Some(0), String::new()), "{package}");

        let named = sums.lines().filter_map(|line| line.split_once("  "));
        let named: BTreeSet<_> = named.map(|(_, path)| path).collect();
        let files = files.iter().map(String::as_str);
        let installed: BTreeSet<_> = files.filter(|path| !path.starts_with("DEBIAN/")).collect();
        assert_eq!(named, installed, "{package}");
        // Commands edit the configurations, and dpkg asks at an upgrade what becomes of an edited conffile.
        assert_eq!(control("conffiles").unwrap_or_default(), "", "{package}");
        let in_etc: Vec<_> = installed.iter().filter(|path| path.starts_with("etc/")).collect();
        assert!(in_etc.is_empty(), "{package}: {in_etc:?}");
    }
}

/// Finds the pages that a file names: `caddy.md` where it says `docs/caddy.md`.
fn pages_named(bytes: &[u8]) -> BTreeSet<String> {
    let text = String::from_utf8_lossy(bytes);
    let page = |rest: &str| {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"-_/".contains(c))?;
        rest[end..].starts_with(".md").then(|| format!("{}.md", &rest[..end]))
    };
    text.split("docs/").skip(1).filter_map(page).collect()
}

#[test]
fn packages_have_the_pages_that_their_programs_and_configurations_name() {
    if !wanted() {
        return;
    }
    for (_, package) in MEMBERS {
        let (dir, files) = unpacked(package);
        // A page itself may name any file of the repository.
        let folder = format!("usr/share/doc/{package}/");
        let others = files.iter().filter(|path| !path.starts_with(&folder));
        let read = |path: &String| fs::read(dir.path().join(path)).expect("read");
        let named: BTreeSet<_> = others.flat_map(|path| pages_named(&read(path))).collect();
        assert!(!named.is_empty(), "{package} was misread");
        let missing: Vec<_> =
            named.iter().filter(|page| !files.contains(&format!("{folder}{page}"))).collect();
        assert!(
            missing.is_empty(),
            "{package} names pages that it has not in {folder}: {missing:?}"
        );
    }
}

#[test]
fn pages_that_a_file_names_are_found() {
    let found = |text: &str| pages_named(text.as_bytes()).into_iter().collect::<Vec<_>>();
    assert_eq!(
        found("\u{0}see docs/a-b.md, or docs/c.md\u{1}docs/d/e.md"),
        ["a-b.md", "c.md", "d/e.md"]
    );
    assert_eq!(found("docs/ a.md docs/b.mp3 docs.md docs/"), [""; 0]);
}

/// Gets the package of `sandboxctl` by apt, on a machine that has this repository alone, with this key for it.
/// Returns its bytes, or what apt says.
fn by_apt(repo: &Path, key: &Path) -> Result<Vec<u8>, String> {
    let machine = tempfile::tempdir().expect("a folder");
    let at = |name: &str| machine.path().join(name);
    for dir in ["etc/preferences.d", "state/lists/partial", "cache/archives/partial", "here"] {
        fs::create_dir_all(at(dir)).expect("made");
    }
    let line = format!("deb [signed-by={}] file:{} stable main\n", key.display(), repo.display());
    fs::write(at("etc/sources.list"), line).expect("written");
    fs::write(at("status"), "").expect("written");
    let set = |name: &str, path: PathBuf| format!("{name}={}", path.display());
    let options = [
        set("Dir::Etc", at("etc")),
        set("Dir::Etc::SourceList", at("etc/sources.list")),
        set("Dir::State", at("state")),
        set("Dir::State::status", at("status")),
        set("Dir::Cache", at("cache")),
        "Dir::Etc::SourceParts=-".to_owned(),
        "Dir::Etc::Trusted=-".to_owned(),
        "Dir::Etc::TrustedParts=-".to_owned(),
        // Nobody else may enter the folders of this test.
        "APT::Sandbox::User=root".to_owned(),
    ];
    for words in [&["update"][..], &["download", CLI]] {
        let mut command = limited(&["apt-get"]);
        for option in &options {
            command.arg("-o").arg(option);
        }
        let (code, text) = run(command.args(words).current_dir(at("here")));
        if code != Some(0) {
            return Err(text);
        }
    }
    Ok(fs::read(file(&at("here"), CLI, ".deb")).expect("read"))
}

/// Adds a byte to a file.
fn spoil(path: &Path) {
    let mut bytes = fs::read(path).expect("read");
    bytes.push(b'\n');
    fs::write(path, bytes).expect("written");
}

#[test]
fn repository_is_taken_with_its_key_and_unchanged_and_not_otherwise() {
    if !wanted() {
        return;
    }
    let work = tempfile::tempdir().expect("a folder");
    let at = |name: &str| work.path().join(name);
    let (keys, repo) = (at("keys"), at("repo"));
    let [own, other] = ["own", "other"].map(|name| repository::signing_key(&keys, name));
    let build = || repository::build(&repo, &built::dir(), &keys, &own);
    let (code, text) = build();
    assert_eq!(code, Some(0), "{text}");
    let mut export = limited(&["gpg", "--batch", "--export", "--output"]);
    let (code, text) = run(export.arg(at("other.gpg")).arg(other).env("GNUPGHOME", &keys));
    assert_eq!(code, Some(0), "{text}");
    // A web server is another user.
    let mut hidden = limited(&["find"]);
    hidden.arg(&repo).args(["!", "-perm", "-o=r", "-o", "-type", "d", "!", "-perm", "-o=x"]);
    assert_eq!(run(&mut hidden), (Some(0), String::new()), "files that nobody can fetch");

    let key = repo.join("pve-sandbox.gpg");
    let package = fs::read(file(&built::dir(), CLI, ".deb")).expect("read");
    let got = by_apt(&repo, &key).unwrap_or_else(|text| panic!("{text}"));
    assert!(got == package, "it is the package that was built");
    let refused = |key: &Path| by_apt(&repo, key).expect_err("apt takes it");
    let text = refused(&at("other.gpg"));
    // Why, apt 2 and apt 3 say in other words.
    assert!(text.contains("is not signed"), "{text}");

    spoil(&file(&repo.join("pool"), CLI, ".deb"));
    let text = refused(&key);
    assert!(text.contains("Hash Sum mismatch") && text.contains("/pool/"), "{text}");
    let (code, text) = build();
    assert!(code == Some(1) && text.contains("exists with other content"), "{code:?}: {text}");
    let index = file_named(&repo, "Packages");
    fs::remove_file(index.with_extension("gz")).expect("removed");
    spoil(&index);
    let text = refused(&key);
    assert!(text.contains("Hash Sum mismatch") && !text.contains("/pool/"), "{text}");
}

/// Returns the only file of this name below a folder.
#[track_caller]
fn file_named(dir: &Path, name: &str) -> PathBuf {
    let mut find = limited(&["find"]);
    let (code, text) = run(find.arg(dir).args(["-name", name]));
    assert!(code == Some(0) && text.lines().count() == 1, "{name}: {text}");
    PathBuf::from(text.trim())
}

/// Returns the crates that are linked into the program of a member, each as name and version.
#[track_caller]
fn linked(member: &str) -> BTreeSet<String> {
    let words = ["cargo", "tree", "--locked", "--offline", "--package", member];
    let mut command = limited(&words);
    command.args(["--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"]);
    let output = command.current_dir(top()).output().expect("started");
    let (code, text) = said(&output);
    assert_eq!(code, Some(0), "{text}");
    // "name vVERSION", then perhaps where it is, and that it was listed before. The first is the program's own.
    let text = String::from_utf8(output.stdout).expect("text");
    let named = |line: &str| {
        let (name, rest) = line.split_once(" v")?;
        let version = rest.split(' ').next()?;
        (name != member).then(|| format!("{name} {version}"))
    };
    text.lines().filter_map(named).collect()
}

/// Returns the crates of a Cargo.lock.
fn locked(text: &str) -> BTreeSet<String> {
    let value = |line: &str, key: &str| {
        let value = line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"')?;
        Some(value.to_owned())
    };
    let named = |package: &str| {
        let name = package.lines().find_map(|line| value(line, "name"))?;
        let version = package.lines().find_map(|line| value(line, "version"))?;
        Some(format!("{name} {version}"))
    };
    text.split("[[package]]").skip(1).filter_map(named).collect()
}

/// Removes the percent-encoding of a text once.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..2).and_then(|code| u8::from_str_radix(code, 16).ok());
        match (code, part.get(2..)) {
            (Some(byte), Some(rest)) => {
                out.push(byte);
                out.extend(rest.as_bytes());
            }
            (None, _) | (_, None) => {
                out.push(b'%');
                out.extend(part.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Says what a bill of materials lacks of the linked crates, what it has that Cargo.lock has not, and which paths of
/// the machine it tells.
fn faults(
    bill: &str,
    linked: &BTreeSet<String>,
    locked: &BTreeSet<String>,
    paths: &[String],
) -> Vec<String> {
    let parsed: Value = serde_json::from_str(bill).expect("JSON");
    let components = parsed["components"].as_array().cloned().unwrap_or_default();
    let named =
        |part: &Value| Some(format!("{} {}", part["name"].as_str()?, part["version"].as_str()?));
    let named: BTreeSet<String> = components.iter().filter_map(named).collect();
    let missing = linked.difference(&named).map(|name| format!("{name} is missing"));
    let strange = named.difference(locked).map(|name| format!("{name} is not in Cargo.lock"));
    let plain = decoded(&decoded(bill));
    let told = paths.iter().filter(|path| plain.contains(path.as_str()));
    let told = told.map(|path| format!("{path} is told"));
    let urls = plain.split("file://").skip(1).filter(|rest| !rest.starts_with("/pve-sandbox"));
    let urls =
        urls.map(|rest| format!("file://{} is told", rest.split('"').next().unwrap_or(rest)));
    missing.chain(strange).chain(told).chain(urls).collect()
}

#[test]
fn bills_of_materials_name_each_linked_crate_and_no_path() {
    if !wanted() {
        return;
    }
    let locked = locked(&fs::read_to_string(top().join("Cargo.lock")).expect("read"));
    // The root of all paths would be found everywhere.
    let home = env::var("HOME").ok().filter(|home| home.len() > 1);
    let paths: Vec<_> = home.into_iter().chain([top().display().to_string()]).collect();
    for (member, package) in MEMBERS {
        let bill = fs::read_to_string(file(&built::dir(), package, ".cdx.json"));
        let linked = linked(member);
        assert!(linked.len() > 100 && locked.len() > linked.len(), "{member}: {linked:?}");
        let faults = faults(&bill.expect("read"), &linked, &locked, &paths);
        assert!(faults.is_empty(), "{package}:\n{}", faults.join("\n"));
    }
    let copy = elsewhere("bills", &["packaging/build-sbom.sh"], None);
    for (_, package) in MEMBERS {
        assert_same(&copy, package, ".cdx.json");
    }
}

#[test]
fn faults_of_a_bill_of_materials_are_found() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\n\
                [[package]]\nname = \"b\"\nversion = \"2.0.0\"\nsource = \"x\"\n";
    let locked = locked(lock);
    assert_eq!(locked, set(&["a 1.0.0", "b 2.0.0"]));
    let paths = ["/srv/the build".to_owned()];
    let of = |components: &str, more: &str| {
        let bill = format!("{{\"components\": [{components}], \"more\": \"{more}\"}}");
        faults(&bill, &set(&["a 1.0.0"]), &locked, &paths)
    };
    let a = "{\"name\": \"a\", \"version\": \"1.0.0\"}";
    let b = "{\"name\": \"b\", \"version\": \"9.0.0\"}";
    let none: [&str; 0] = [];
    assert_eq!(of(a, "file:%2F%2F%2Fpve-sandbox%2Fa, 100%, %zz"), none);
    assert_eq!(of("", ""), ["a 1.0.0 is missing"]);
    assert_eq!(of(&format!("{a}, {b}"), ""), ["b 9.0.0 is not in Cargo.lock"]);
    for written in ["/srv/the build", "%2Fsrv%2Fthe%20build", "%252Fsrv%252Fthe%2520build"] {
        assert_eq!(of(a, written), ["/srv/the build is told"], "{written}");
    }
    assert_eq!(of(a, "path+file:///tmp/x"), ["file:///tmp/x is told"]);
}
