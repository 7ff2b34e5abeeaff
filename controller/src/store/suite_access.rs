//! The suite's part about tokens, for both stores.

use proto::scope::Scopes;

use super::{access::TOKENS_MAX, memory::Memory, sqlite::Sqlite, *};

/// Token number `n` of a team, issued at the time `n`.
pub(super) fn token(team: &str, n: u64) -> Token {
    Token {
        id: format!("{team}{n:04}"),
        hash: vec![1; 32],
        team: team.parse().expect("team"),
        name: format!("t{n}").parse().expect("name"),
        user: None,
        scopes: Scopes::SANDBOX,
        created_ms: n,
        expires_ms: 0,
        used_ms: 0,
        revoked_ms: 0,
    }
}

async fn one_token(store: &dyn Store) -> Result<()> {
    let first = Token {
        user: Some("ada@example.com".parse().expect("user")),
        scopes: "exec".parse().expect("scopes"),
        expires_ms: 100,
        ..token("red", 1)
    };
    assert_eq!(store.add_token(first.clone()).await?, Added::New);
    assert_eq!(store.token(&first.id).await?, Some(first.clone()));
    assert_eq!(store.token("none").await?, None);
    let named = |now_ms| store.token_named(&first.team, &first.name, now_ms);
    assert_eq!(named(99).await?, Some(first.clone()));
    assert_eq!(named(100).await?, None, "expired");

    // The time of use never goes back; an unknown token is passed over.
    let used = |ms| vec![("none".to_owned(), 1), (first.id.clone(), ms)];
    store.tokens_used(used(50)).await?;
    store.tokens_used(used(40)).await?;
    assert_eq!(store.token(&first.id).await?.expect("known").used_ms, 50);

    assert!(store.revoke_token(&first.id, 9).await? && !store.revoke_token("none", 9).await?);
    assert!(store.revoke_token(&first.id, 10).await?, "twice is once");
    assert_eq!(store.token(&first.id).await?.expect("known").revoked_ms, 9);
    assert_eq!(named(20).await?, None, "revoked");
    Ok(())
}

async fn names_of_tokens(store: &dyn Store) -> Result<()> {
    let again = |id: &str, created_ms| Token {
        id: id.into(),
        created_ms,
        expires_ms: 300,
        ..token("green", 1)
    };
    assert_eq!(store.add_token(again("a", 200)).await?, Added::New);
    assert_eq!(store.add_token(again("b", 201)).await?, Added::NameTaken);
    assert_eq!(store.token("b").await?, None);
    let other_team = Token { id: "c".into(), ..token("blue", 1) };
    assert_eq!(store.add_token(other_team).await?, Added::New, "a name is of one team");
    // A name is free again after the expiry and after a revocation.
    assert_eq!(store.add_token(Token { expires_ms: 0, ..again("d", 300) }).await?, Added::New);
    assert_eq!(store.add_token(again("e", 301)).await?, Added::NameTaken);
    store.revoke_token("d", 302).await?;
    assert_eq!(store.add_token(again("e", 303)).await?, Added::New);
    let teams = store.token_teams().await?;
    let teams: Vec<_> = teams.iter().map(proto::name::Team::as_str).collect();
    assert_eq!(teams, ["blue", "green", "red"]);
    Ok(())
}

async fn pages_of_tokens(store: &dyn Store) -> Result<()> {
    for n in 0..7 {
        store.add_token(token("many", 1000 + n / 2 * 2 + n)).await?;
    }
    store.revoke_token("many1001", 2000).await?;
    let team = Some("many".parse().expect("team"));
    for (living_ms, count) in [(None, 7), (Some(3000), 6)] {
        let filter = || TokenFilter { team: team.clone(), living_ms };
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = store.tokens(filter(), after.clone(), 2).await?;
            assert!(page.len() <= 2);
            let Some(last) = page.last() else { break };
            after = Some((last.created_ms, last.id.clone()));
            seen.extend(page);
        }
        let places: Vec<_> = seen.iter().map(|token| (token.created_ms, &token.id)).collect();
        assert!(places.is_sorted() && seen.len() == count, "{places:?}");
    }
    let asked = ["many1001", "none", "many1000", "red0001"].map(str::to_owned).to_vec();
    let mut found = store.tokens_by_id(asked).await?;
    found.sort_by(|a, b| a.id.cmp(&b.id));
    let found: Vec<_> = found.iter().map(|token| (token.id.as_str(), token.revoked_ms)).collect();
    assert_eq!(found, [("many1000", 0), ("many1001", 2000), ("red0001", 9)]);
    assert_eq!(store.tokens_by_id(Vec::new()).await?, []);
    let all = store.tokens(TokenFilter::default(), None, 1000).await?;
    assert!(all.len() > 7 && all.iter().any(|token| token.team.as_str() == "red"));
    Ok(())
}

async fn bounds_of_tokens(store: &dyn Store) -> Result<()> {
    // At once, so that they share commits.
    let adds = (0..u64::from(TOKENS_MAX)).map(|n| store.add_token(token("big", 5000 + n)));
    let added = futures_util::future::join_all(adds).await;
    assert!(added.iter().all(|added| *added == Ok(Added::New)));
    assert_eq!(store.add_token(token("big", 9000)).await?, Added::Full);
    store.revoke_token("big5000", 9001).await?;
    assert_eq!(store.add_token(token("big", 9002)).await?, Added::New);
    // Long after its end a token is removed by the next one that is made.
    let later = 9001 + access::DEAD_TOKENS_KEPT_MS;
    store.add_token(token("late", later)).await?;
    assert!(store.token("big5000").await?.is_some());
    store.add_token(token("late", later + 1)).await?;
    assert_eq!(store.token("big5000").await?, None);
    Ok(())
}

async fn ssh_keys(store: &dyn Store) -> Result<()> {
    let key = |team: &str, n: u64, hash: u8| SshKey {
        token: Token { hash: vec![hash; 33], ..token(team, n) },
        key: format!("ssh-ed25519 {hash}"),
        added_by: "maker".into(),
    };
    // Time of the tests before: later tokens remove those that ended long ago.
    let at = 9001 + access::DEAD_TOKENS_KEPT_MS + 10;
    let first = key("ssha", at, 7);
    assert_eq!(store.add_ssh_key(first.clone()).await?, Added::New);
    assert_eq!(store.add_ssh_key(key("ssha", at + 1, 7)).await?, Added::KeyTaken);
    let named =
        SshKey { token: Token { id: "x".into(), ..key("ssha", at, 8).token }, ..first.clone() };
    assert_eq!(store.add_ssh_key(named).await?, Added::NameTaken);
    // Another team may have the same key, and is found with it.
    let other = key("sshb", at + 1, 7);
    assert_eq!(store.add_ssh_key(other.clone()).await?, Added::New);
    let found = store.tokens_by_hash(&[7; 33], at + 2).await?;
    assert_eq!(found, [first.token.clone(), other.token.clone()]);
    assert_eq!(store.tokens_by_hash(&[9; 33], at + 2).await?, []);
    let of = |team: &str| TokenFilter { team: team.parse().ok(), living_ms: Some(at + 2) };
    assert_eq!(store.ssh_keys(of("ssha"), None, 10).await?, std::slice::from_ref(&first));
    let all = TokenFilter { team: None, living_ms: Some(at + 2) };
    assert_eq!(store.ssh_keys(all.clone(), None, 1).await?, std::slice::from_ref(&first));
    let after = Some((first.token.created_ms, first.token.id.clone()));
    assert_eq!(store.ssh_keys(all, after, 10).await?, [other]);
    // An ended one frees the key, and goes with its token.
    store.revoke_token(&first.token.id, at + 3).await?;
    assert_eq!(store.tokens_by_hash(&[7; 33], at + 4).await?.len(), 1);
    assert_eq!(store.add_ssh_key(key("ssha", at + 5, 7)).await?, Added::New);
    Ok(())
}

async fn bounds_of_ended_tokens(store: &dyn Store) -> Result<()> {
    // Time of the tests before, as above.
    let at = 9001 + access::DEAD_TOKENS_KEPT_MS + 100;
    let key = |n: u64| SshKey {
        token: Token { hash: n.to_be_bytes().to_vec(), ..token("ends", at + n) },
        key: format!("ssh-ed25519 {n}"),
        added_by: "maker".into(),
    };
    let many = access::DEAD_TOKENS_MAX as u64 + 5;
    // At once, so that they share commits; in two parts, because that many may not be living.
    for part in [0..many / 2, many / 2..many] {
        let added = futures_util::future::join_all(part.clone().map(|n| store.add_ssh_key(key(n))));
        assert!(added.await.iter().all(|added| *added == Ok(Added::New)));
        let ids: Vec<_> = part.map(|n| key(n).token.id).collect();
        let revoked = ids.iter().map(|id| store.revoke_token(id, at + many));
        assert!(futures_util::future::join_all(revoked).await.iter().all(|done| *done == Ok(true)));
    }
    store.add_token(token("ends", at + many)).await?;
    let filter = || TokenFilter { team: "ends".parse().ok(), living_ms: None };
    let kept = store.tokens(filter(), None, 5000).await?;
    let kept: Vec<_> = kept.iter().map(|token| token.created_ms - at).collect();
    assert_eq!(kept, (5..=many).collect::<Vec<_>>(), "the newest");
    let keys = store.ssh_keys(filter(), None, 5000).await?;
    assert_eq!(keys.len(), access::DEAD_TOKENS_MAX, "a key goes with its token");
    assert!(store.token("big5001").await?.is_some(), "another team's stay");
    Ok(())
}

async fn limits_of_teams(store: &dyn Store) -> Result<()> {
    use proto::limits::TeamLimits;
    assert_eq!(store.team_limits().await?, []);
    let (red, blue): (Team, Team) = ("red".parse().expect("team"), "blue".parse().expect("team"));
    let first = TeamLimits::stored("sandboxes=5 creates=10/hour");
    store.put_team_limits(&red, first).await?;
    store.put_team_limits(&blue, TeamLimits::stored("cpu_cores=none")).await?;
    let second = TeamLimits::stored("sandboxes=6");
    store.put_team_limits(&red, second.clone()).await?;
    let all = store.team_limits().await?;
    assert_eq!(all, [(blue, TeamLimits::stored("cpu_cores=none")), (red, second)]);
    Ok(())
}

async fn suite(store: &dyn Store) {
    one_token(store).await.expect("one token");
    names_of_tokens(store).await.expect("names");
    pages_of_tokens(store).await.expect("pages");
    bounds_of_tokens(store).await.expect("bounds");
    ssh_keys(store).await.expect("keys");
    bounds_of_ended_tokens(store).await.expect("ended ones");
    limits_of_teams(store).await.expect("limits");
}

#[tokio::test]
async fn memory_store_keeps_tokens_as_promised() {
    suite(&Memory::new()).await;
}

#[tokio::test]
async fn sqlite_store_keeps_tokens_as_promised() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let store = Sqlite::open(&path).expect("open");
    suite(&store).await;
    let all = |store: Sqlite| async move {
        store.tokens(TokenFilter::default(), None, 10_000).await.expect("tokens")
    };
    // A command beside the controller has a handle of its own.
    let beside = Sqlite::open(&path).expect("open beside");
    assert!(beside.revoke_token("many1000", 3000).await.expect("revoked"));
    let seen = store.tokens_by_id(vec!["many1000".into()]).await.expect("read");
    assert_eq!(seen.iter().map(|token| token.revoked_ms).collect::<Vec<_>>(), [3000]);
    drop(beside);
    let before = all(store).await;
    assert_eq!(all(Sqlite::open(&path).expect("open again")).await, before);
}

/// A read whose time another tenant decides, such as a page of a long log, has a thread of its own.
#[tokio::test]
async fn look_up_of_a_token_waits_for_no_other_read() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = std::sync::Arc::new(Sqlite::open(&dir.path().join("c.db")).expect("open"));
    let first = token("red", 1);
    assert_eq!(store.add_token(first.clone()).await, Ok(Added::New));
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let (begin, begun) = tokio::sync::oneshot::channel();
    let reading = store.clone();
    let slow = tokio::spawn(async move {
        let read = reading.read(move |_| {
            begin.send(()).expect("awaited");
            ended.recv().ok();
            Ok(())
        });
        read.await
    });
    begun.await.expect("it reads");
    assert_eq!(store.token(&first.id).await.expect("read"), Some(first.clone()));
    assert_eq!(store.tokens_by_id(vec![first.id.clone()]).await.expect("read").len(), 1);
    assert_eq!(store.tokens_by_hash(&first.hash, 2).await.expect("read").len(), 1);
    assert!(!slow.is_finished());
    drop(end);
    assert_eq!(slow.await.expect("no panic"), Ok(()));
}

#[tokio::test]
async fn tokens_of_the_first_schema_keep_their_rights() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let raw = rusqlite::Connection::open(&path).expect("open");
    raw.execute_batch(include_str!("migrations/0001_start.sql")).expect("made");
    raw.pragma_update(None, "user_version", 1).expect("set");
    raw.execute_batch(
        "INSERT INTO tokens VALUES ('0a', x'01', 'red', 'sandbox', 5, 0), \
         ('0b', x'02', 'red', 'sandbox operator', 6, 7)",
    )
    .expect("filled");
    drop(raw);
    let store = Sqlite::open(&path).expect("migrated");
    let tokens = store.tokens(TokenFilter::default(), None, 10).await.expect("tokens");
    let told: Vec<_> =
        tokens.iter().map(|token| (token.name.as_str(), token.scopes, token.revoked_ms)).collect();
    assert_eq!(told, [("0a", Scopes::SANDBOX, 0), ("0b", Scopes::ALL, 7)]);
    assert!(tokens.iter().all(|token| token.expires_ms == 0 && token.user.is_none()));
}
