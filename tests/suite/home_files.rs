//! Claim 24: the daemon's files are in a directory that only its user can change, and no name there leads elsewhere.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

use landfall_tests::case::Case;
use landfall_tests::{Home, OTHER_UID, can_change_user};

pub(crate) const CASES: &[Case] = &[
    Case::once("c24_root_refuses_a_home_that_another_user_can_change", foreign_homes),
    Case::once("c24_a_link_among_the_daemons_files_is_not_followed", links),
    Case::once("c24_a_link_among_the_daemons_directories_is_refused", linked_directories),
];

/// Returns the outputs of the daemon, and of the verb that starts it, for a home.
fn refusals(home: &Home, path: &Path) -> [Output; 2] {
    [&["_hostd"][..], &["up", "--http-port", "0"]]
        .map(|arguments| home.command(arguments).env("LANDFALL_HOME", path).output().unwrap())
}

fn make(path: &Path, owner: Option<u32>, mode: u32) -> PathBuf {
    fs::create_dir_all(path).unwrap();
    chown(path, owner, owner).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    path.to_owned()
}

fn foreign_homes() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let place = home.folder("homes");
    let of_a_stranger = make(&place.join("a"), Some(OTHER_UID), 0o700);
    let open = make(&place.join("b"), None, 0o777);
    let group = make(&place.join("c"), None, 0o770);
    chown(&group, None, Some(OTHER_UID)).unwrap();
    let parent = make(&place.join("d"), Some(OTHER_UID), 0o755);
    let below = make(&parent.join("home"), None, 0o700);
    // The directory of the link decides where it leads, even if the home itself belongs to root.
    let by_a_link = parent.join("link");
    symlink(make(&place.join("e"), None, 0o700), &by_a_link).unwrap();
    let absent = parent.join("absent");
    for (path, culprit, reason) in [
        (&of_a_stranger, &of_a_stranger, "belongs to uid 61234"),
        (&open, &open, "others may write to"),
        (&group, &group, "others may write to"),
        (&below, &parent, "belongs to uid 61234"),
        (&by_a_link, &parent, "belongs to uid 61234"),
        (&absent, &parent, "belongs to uid 61234"),
    ] {
        for refusal in refusals(&home, path) {
            let printed = String::from_utf8_lossy(&refusal.stderr);
            assert!(!refusal.status.success(), "{}: {printed}", path.display());
            let names = [reason, culprit.to_str().unwrap(), "hint:", "LANDFALL_HOME"];
            assert!(names.iter().all(|name| printed.contains(name)), "{}: {printed}", path.display());
        }
        assert!(!path.join("run").exists(), "something was made in {}", path.display());
    }
    // A sticky directory such as /tmp, and root's own through a link of root.
    let sticky = make(&place.join("f"), None, 0o1777);
    let fine = make(&sticky.join("home"), None, 0o700);
    let link = place.join("g");
    symlink(&fine, &link).unwrap();
    for path in [fine, link] {
        let output = home.command(&["up", "--http-port", "0"]).env("LANDFALL_HOME", &path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(home.command(&["down"]).env("LANDFALL_HOME", &path).status().unwrap().success());
    }
}

fn links() {
    for name in [
        "log/hostd.log",
        "run/hostd.pid",
        "run/hostd.pid.new",
        "run/hostd.lock",
        "run/hostd.alive",
        "run/hostd.port.new",
    ] {
        let home = Home::new();
        let victim = home.folder("outside").join("victim");
        fs::write(&victim, "a person's file").unwrap();
        let link = home.path().join(name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(&victim, &link).unwrap();
        let _ = home.run(&["up", "--http-port", "0"]);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "a person's file", "{name}");
        let _ = home.run(&["down"]);
    }
}

fn linked_directories() {
    for name in ["run", "log", "keys", "run/registrations"] {
        let home = Home::new();
        let victim = home.folder("outside");
        fs::set_permissions(&victim, Permissions::from_mode(0o755)).unwrap();
        let link = home.path().join(name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(&victim, &link).unwrap();
        for refusal in refusals(&home, &home.path()) {
            let printed = String::from_utf8_lossy(&refusal.stderr);
            assert!(!refusal.status.success() && printed.contains("is not a directory"), "{name}: {printed}");
        }
        assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o755, "{name}");
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "{name}");
    }
}
