//! Links between the pages: each leads to a file and a heading that exist, and each page is found from the README.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

/// Pages of the repository by their path from its root.
type Pages = BTreeMap<PathBuf, String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn pages() -> Pages {
    let mut found = Pages::new();
    for folder in ["", "docs", "docs/decisions"] {
        for entry in std::fs::read_dir(root().join(folder)).expect(folder) {
            let name = PathBuf::from(entry.expect(folder).file_name());
            if name.extension().is_some_and(|extension| extension == "md") {
                let path = Path::new(folder).join(name);
                let text = std::fs::read_to_string(root().join(&path)).expect("a page");
                found.insert(path, text);
            }
        }
    }
    found
}

/// Lines of a page outside of its blocks of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    })
}

/// Targets of the links in a page to other files and headings of the repository.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(text) {
        // What stands in backticks is code.
        let words: String = line.split('`').step_by(2).collect();
        let targets = words.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let own = targets.filter(|target| !target.contains("://") && !target.contains(' '));
        found.extend(own.map(str::to_owned));
    }
    found
}

/// Anchors of the headings of a page, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter_map(|line| line.strip_prefix('#'));
    let mut found = BTreeSet::new();
    for heading in headings {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        // A heading that is there twice gets a number, which no link uses.
        found.insert(anchor);
    }
    found
}

/// Returns the path of what a link in `page` leads to, and its anchor.
fn target(page: &Path, link: &str) -> (PathBuf, Option<String>) {
    let (path, anchor) = match link.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor.to_owned())),
        None => (link, None),
    };
    if path.is_empty() {
        return (page.to_owned(), anchor);
    }
    let mut whole = PathBuf::new();
    for part in page.with_file_name("").join(path).components() {
        match part {
            Component::ParentDir => drop(whole.pop()),
            Component::CurDir => {}
            part @ (Component::Normal(_) | Component::RootDir | Component::Prefix(_)) => {
                whole.push(part);
            }
        }
    }
    (whole, anchor)
}

/// Says which links of these pages lead nowhere.
fn dead(pages: &Pages, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for (page, text) in pages {
        for link in links(text) {
            let (path, anchor) = target(page, &link);
            let there = match (pages.get(&path), anchor) {
                (Some(text), Some(anchor)) => anchors(text).contains(&anchor),
                (Some(_), None) => true,
                (None, _) => exists(&path),
            };
            if !there {
                wrong.push(format!("{}: {link}", page.display()));
            }
        }
    }
    wrong
}

/// Returns the pages of docs that no chain of links from the README leads to.
fn unreachable(pages: &Pages) -> Vec<&Path> {
    let mut seen = BTreeSet::new();
    let mut next = vec![PathBuf::from("README.md")];
    while let Some(page) = next.pop() {
        let Some(text) = pages.get(&page) else { continue };
        if seen.insert(page.clone()) {
            next.extend(links(text).iter().map(|link| target(&page, link).0));
        }
    }
    let all = pages.keys().filter(|page| page.starts_with("docs"));
    all.filter(|page| !seen.contains(*page)).map(PathBuf::as_path).collect()
}

#[test]
fn every_link_leads_to_a_file_and_a_heading_that_exist() {
    let pages = pages();
    let count: usize = pages.values().map(|text| links(text).len()).sum();
    assert!(count > 150, "the pages were misread: {count} links");
    let dead = dead(&pages, |path| root().join(path).exists());
    assert!(dead.is_empty(), "{}", dead.join("\n"));
}

#[test]
fn every_page_is_found_from_the_readme() {
    let pages = pages();
    let lost = unreachable(&pages);
    assert!(lost.is_empty(), "no link leads to {lost:?}");
}

#[test]
fn dead_links_and_lost_pages_are_found() {
    let index = "# Index\n[a](docs/a.md) [a](docs/a.md#two-words) `[code](gone.md)`\n```\n[b](gone.md)\n```\n\
                 [c](gone.md) [d](docs/a.md#three) [e](https://example.com) [f](#index)";
    let a = "# A\n## Two `words`!\n[up](../README.md#index) [side](../docs/gone.md)";
    let texts = [("README.md", index), ("docs/a.md", a), ("docs/lost.md", "# Lost")];
    let pages: Pages =
        texts.into_iter().map(|(path, text)| (PathBuf::from(path), text.to_owned())).collect();
    let expected =
        ["README.md: gone.md", "README.md: docs/a.md#three", "docs/a.md: ../docs/gone.md"];
    assert_eq!(dead(&pages, |_| false), expected);
    assert_eq!(unreachable(&pages), [Path::new("docs/lost.md")]);
}
