use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn accounts() -> Accounts {
    Accounts {
        passwd: "root:x:0:0::/root:/bin/sh\n\n app:x:3001:3002::/:/bin/sh\nother:x:3003:9\nbad:x:-1:0\nbad-group:x:7:\n"
            .to_owned(),
        group: "root:x:0:\nwww:x:33:app\napp:x:3002:\nbad:x:many:\n".to_owned(),
    }
}

#[track_caller]
fn pinned(user: &str) -> String {
    pin_user(user, &accounts()).unwrap()
}

#[test]
fn a_user_is_resolved_as_docker_does() {
    for (user, expected) in [
        ("", "0:0"),
        ("0", "0:0"),
        ("root", "0:0"),
        ("app", "3001:3002"),
        ("3001", "3001:3002"),
        ("app:", "3001:3002"),
        ("app:www", "3001:33"),
        ("app:7", "3001:7"),
        ("4000", "4000:0"),
        ("4000:www", "4000:33"),
        ("4000:5000", "4000:5000"),
        (":www", "0:33"),
    ] {
        assert_eq!(pinned(user), expected, "{user:?}");
        assert!(needs_accounts(user, &[]) || pin_user(user, &Accounts::default()).unwrap() == expected);
    }
}

#[test]
fn an_unknown_account_is_an_error_that_names_it() {
    for (user, named) in [
        ("nobody", "the user nobody"),
        ("bad", "the user bad"),
        ("bad-group", "the group of the user bad-group"),
        ("app:nobody", "the group nobody"),
        ("app:bad", "the group bad"),
        ("99999999999", "the user 99999999999"),
        ("-1", "the user -1"),
        ("+1", "the user +1"),
    ] {
        let error = pin_user(user, &accounts()).unwrap_err().to_string();
        assert!(error.starts_with(named), "{user}: {error}");
    }
    let groups = |groups: &[&str]| {
        let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        pin("0", &groups, &accounts()).map(|(_, groups)| groups)
    };
    assert_eq!(groups(&["www", "44"]).unwrap(), ["33", "44"]);
    assert!(groups(&["www", "video"]).unwrap_err().to_string().starts_with("the group video"));
}

proptest! {
    #[test]
    fn accounts_of_a_container_never_make_another_user_root(
        user in "[a-z]{1,4}|[1-9][0-9]{0,11}", passwd in any::<String>(), group in any::<String>(),
    ) {
        let accounts = Accounts { passwd, group };
        if let Ok(pinned) = pin_user(&user, &accounts) {
            let is_listed = accounts.passwd.lines().any(|line| line.trim().starts_with(&format!("{user}:")));
            prop_assert!(is_listed || !pinned.starts_with("0:"), "{pinned}");
            prop_assert!(is_pinned(&pinned));
        }
    }
}

fn labels(own: &[(&str, &str)], image: &[(&str, &str)]) -> ContainerLabels {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let all = map(image).into_iter().chain(map(own)).collect();
    ContainerLabels::new(all, ImageLabels::of(map(image)))
}

fn requested(labels: &ContainerLabels, container: Option<&str>, image: Option<&str>) -> Option<String> {
    let config = ContainerConfig { user: container.map(str::to_owned), ..ContainerConfig::default() };
    let image = ImageConfig { user: image.map(str::to_owned), ..ImageConfig::default() };
    requested_user(labels, &config, &image)
}

#[test]
fn c23_the_requested_user_survives_an_image_that_names_it() {
    let none = labels(&[], &[]);
    assert_eq!(requested(&none, Some("app"), Some("app")), None, "its image decides");
    assert_eq!(requested(&none, Some(""), Some("")), None);
    assert_eq!(requested(&none, Some("3001"), Some("0")), Some("3001".to_owned()));
    let recorded = labels(&[(USER_LABEL, "3001")], &[]);
    assert_eq!(requested(&recorded, Some("3001:0"), Some("3001:0")), Some("3001".to_owned()));
    let of_image = labels(&[(USER_LABEL, "")], &[]);
    assert_eq!(requested(&of_image, Some("3001:0"), Some("0")), None);
    // The label of an image is not used.
    let forged = labels(&[], &[(USER_LABEL, "")]);
    assert_eq!(requested(&forged, Some("3001"), Some("0")), Some("3001".to_owned()));
}

#[test]
fn c23_a_new_image_must_not_change_which_labels_are_the_containers_own() {
    let own = labels(&[("dev.landfall.deny", "5432")], &[("dev.landfall.allow", "3000")]);
    let check = |image: &[(&str, &str)], whose| {
        let image = image.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        check_image_labels(Some(image), &own, whose).map_err(|error| error.to_string())
    };
    let (container, user) = (UserOfRebuild::Recorded, UserOfRebuild::Images);
    for whose in [container, user] {
        let reserved = check(&[(USER_LABEL, "")], whose).unwrap_err();
        assert!(reserved.contains("dev.landfall.user is reserved"), "{reserved}");
        let long = "x".repeat(100_000);
        assert!(check(&[("dev.landfall.allow", &long)], whose).unwrap_err().contains("too long"));
        let others =
            [("maintainer", long.as_str()), ("dev.landfall.allow", "3000"), ("dev.landfall.deny", "1")];
        assert_eq!(check(&others, whose), Ok(()));
    }
    let same = [("dev.landfall.deny", "5432")];
    assert!(check(&same, container).unwrap_err().contains("its label dev.landfall.deny"));
    assert_eq!(check(&same, user), Ok(()));
    assert_eq!(check_image_labels(None, &own, container), Ok(()));
}
