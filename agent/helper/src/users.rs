//! Looks up users in the sandbox's own /etc/passwd and /etc/group. Wrong content there can only
//! mislead its author. Pure, except for reading the files.

use std::{fs::File, io::Read};

use helper::User;

/// Most bytes read of either file.
const BYTES_MAX: u64 = 1024 * 1024;
/// Most groups of a user; the kernel takes no more.
const GROUPS_MAX: usize = 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
    pub(crate) groups: Vec<u32>,
}

/// Looks up a user. A numeric uid needs no entry.
pub(crate) fn look_up(user: &User) -> Option<Account> {
    find(user, &read("/etc/passwd"), &read("/etc/group"))
}

/// Looks up the owner of files, `USER` or `USER:GROUP`, each by name or number. A user alone brings
/// the group of its entry in /etc/passwd. Returns `Some(None)` for an empty text, and `None` for an
/// unknown name.
pub(crate) fn owner(text: &str) -> Option<Option<(u32, u32)>> {
    if text.is_empty() {
        return Some(None);
    }
    find_owner(text, &read("/etc/passwd"), &read("/etc/group")).map(Some)
}

fn find_owner(text: &str, passwd: &str, group: &str) -> Option<(u32, u32)> {
    let (user, of_group) = text.split_once(':').map_or((text, None), |(u, g)| (u, Some(g)));
    let user = user.parse().map_or_else(|_| User::Name(user.to_owned()), User::Id);
    let account = find(&user, passwd, "")?;
    let Some(name) = of_group else { return Some((account.uid, account.gid)) };
    if let Ok(gid) = name.parse() {
        return Some((account.uid, gid));
    }
    let gid = group.lines().find_map(|line| {
        let mut fields = line.split(':');
        let own = fields.next()? == name;
        let gid = fields.nth(1)?.parse().ok()?;
        own.then_some(gid)
    });
    Some((account.uid, gid?))
}

fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    // An absent or unreadable file counts as empty: then there are no names.
    if let Ok(file) = File::open(path) {
        drop(file.take(BYTES_MAX).read_to_end(&mut bytes));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn find(user: &User, passwd: &str, group: &str) -> Option<Account> {
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        let wanted = match user {
            User::Name(wanted) => name == wanted,
            User::Id(wanted) => uid == *wanted,
        };
        let (name, home) = (name.to_owned(), home.to_owned());
        wanted.then_some(Account { name, uid, gid, home, groups: vec![gid] })
    });
    match (entry, user) {
        (Some(mut account), _) => {
            account.groups.extend(memberships(&account.name, account.gid, group));
            Some(account)
        }
        (None, User::Id(id)) => Some(Account {
            name: id.to_string(),
            uid: *id,
            gid: *id,
            home: "/".to_owned(),
            groups: vec![*id],
        }),
        (None, User::Name(_)) => None,
    }
}

fn memberships<'a>(name: &'a str, own: u32, group: &'a str) -> impl Iterator<Item = u32> + 'a {
    let groups = group.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, gid, members, ..] = fields[..] else { return None };
        let gid = gid.parse().ok().filter(|gid| *gid != own)?;
        members.split(',').any(|member| member == name).then_some(gid)
    });
    groups.take(GROUPS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbad line\n\
        www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\nx:x:-1:0::/:\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:syslog,www-data\nwww-data:x:33:www-data\n\
        tape:x:26:www-data,root\nbad:x:one:www-data\n";

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let find = |user: User| find(&user, PASSWD, GROUP);
        let www = find(User::Name("www-data".into())).expect("there");
        assert_eq!((www.uid, www.gid, www.home.as_str()), (33, 33, "/var/www"));
        assert_eq!(www.groups, [33, 4, 26]);
        assert_eq!(find(User::Id(33)), Some(www));
        let nobody = find(User::Id(1234)).expect("a number is enough");
        assert_eq!(
            (nobody.gid, nobody.home.as_str(), &nobody.groups[..]),
            (1234, "/", &[1234][..])
        );
        assert_eq!(find(User::Name("1234".into())), None);
        assert_eq!(find(User::Name("x".into())), None, "a broken entry is none");
    }

    #[test]
    fn owners_are_found_by_name_and_by_number() {
        let find = |text: &str| find_owner(text, PASSWD, GROUP);
        for (text, found) in [
            ("www-data", Some((33, 33))),
            ("www-data:adm", Some((33, 4))),
            ("33", Some((33, 33))),
            ("70000", Some((70_000, 70_000))),
            ("4294967294:tape", Some((4_294_967_294, 26))),
            ("root:7", Some((0, 7))),
            ("nobody", None),
            ("root:nogroup", None),
            ("root:", None),
            (":root", None),
        ] {
            assert_eq!(find(text), found, "{text}");
        }
    }
}
