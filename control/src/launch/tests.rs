use super::*;

/// Actions that record their calls.
#[derive(Default)]
struct Fake {
    done: Vec<String>,
    fails: Option<&'static str>,
}

impl Fake {
    fn note(&mut self, what: &str, tokens: &Tokens) -> Result<(), &'static str> {
        self.done.push(format!("{what} {} {}", tokens.restart.reveal(), tokens.broker.reveal()));
        if self.fails == Some(what) { Err("no") } else { Ok(()) }
    }
}

impl LaunchActions for Fake {
    type Error = &'static str;

    fn tokens(&mut self) -> Result<Tokens, &'static str> {
        let token = |what: &str| Token::new(what).unwrap();
        Ok(Tokens { restart: token("r"), broker: token("b") })
    }

    fn register(&mut self, tokens: &Tokens) -> Result<(), &'static str> {
        self.note("register", tokens)
    }

    fn deregister(&mut self) {
        self.done.push("deregister".to_owned());
    }

    async fn run(&mut self, tokens: &Tokens) -> Result<(), &'static str> {
        self.note("run", tokens)
    }
}

#[tokio::test]
async fn a_container_is_registered_before_it_runs_and_deregistered_if_it_fails() {
    for (fails, result, done) in [
        (None, Ok(()), vec!["register r b", "run r b"]),
        (Some("run"), Err("no"), vec!["register r b", "run r b", "deregister"]),
        (Some("register"), Err("no"), vec!["register r b"]),
    ] {
        let mut actions = Fake { fails, ..Fake::default() };
        assert_eq!(start(&mut actions).await, result);
        assert_eq!(actions.done, done);
    }
}

#[test]
fn a_container_has_its_variables_under_both_prefixes_and_no_token_in_its_labels() {
    let name = ContainerName::new("shop").unwrap();
    let from = BuildFrom::default();
    let recipe = Recipe {
        name: &name,
        folder: "/home/u/my shop",
        http_directory: "/home/u/.landfall/run/http/shop",
        image: "landfall-shop",
        built: Some(&from),
        http_port: NonZeroU16::new(8974).unwrap(),
    };
    let tokens = Tokens::fresh().unwrap();
    let made = recipe.container(&tokens);
    let value = |name: &str| made.environment.iter().find(|(known, _)| known == name).unwrap().1.as_str();
    for prefix in ["LANDFALL", "TYPECLAW"] {
        assert_eq!(value(&format!("{prefix}_CONTAINER_NAME")), "shop");
        assert_eq!(value(&format!("{prefix}_HOSTD_URL")), "http://host.docker.internal:8974");
        assert_eq!(value(&format!("{prefix}_HOSTD_TOKEN")), tokens.restart.reveal());
        assert_eq!(value(&format!("{prefix}_HOSTD_BROKER_TOKEN")), tokens.broker.reveal());
    }
    assert_eq!(value("LANDFALL_HOSTD_SOCKET"), "/run/landfall-http/http.sock");
    assert_eq!(made.http_directory.1, "/run/landfall-http");
    assert_eq!(made.environment.len(), 9);
    assert_eq!(made.folder, ("/home/u/my shop".to_owned(), "/workspaces/my shop".to_owned()));
    assert_eq!(made.labels[FOLDER_LABEL], "/home/u/my shop");
    assert!(!made.labels.values().any(|value| value.contains(tokens.restart.reveal())));
}

#[test]
fn tokens_are_long_and_never_the_same() {
    let (one, other) = (Tokens::fresh().unwrap(), Tokens::fresh().unwrap());
    let all = [&one.restart, &one.broker, &other.restart, &other.broker].map(Token::reveal);
    assert!(all.iter().all(|token| token.len() == 43));
    let different: std::collections::BTreeSet<_> = all.into_iter().collect();
    assert_eq!(different.len(), 4);
}

#[test]
fn the_image_is_the_given_one_or_that_of_the_file_or_of_the_dockerfile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    let declared = |text: &str| {
        std::fs::write(path.join(".devcontainer.json"), text).unwrap();
        Devcontainer::read(&path).unwrap().unwrap().devcontainer
    };
    let nothing = Devcontainer::default();
    let named = |image: &str| Ok(Image::Named(image.to_owned()));
    assert_eq!(Image::of(&path, Some("one"), &declared(r#"{"image": "two"}"#)), named("one"));
    assert_eq!(Image::of(&path, None, &declared(r#"{"image": "two"}"#)), named("two"));
    assert!(Image::of(&path, None, &nothing).unwrap_err().starts_with("no image and no Dockerfile"));
    std::fs::create_dir(path.join("app")).unwrap();
    std::fs::write(path.join("app/D"), "FROM scratch").unwrap();
    let built = |text: &str| Image::of(&path, None, &declared(text));
    let from = BuildFrom { context: "app".into(), dockerfile: "D".into() };
    let ok = built(r#"{"build": {"dockerfile": "app/../app/D", "context": "./app"}}"#);
    assert_eq!(ok, Ok(Image::Built(from)));
    let outside = built(r#"{"build": {"dockerfile": "app/D", "context": ".."}}"#);
    assert!(outside.unwrap_err().ends_with(&format!("is not inside {}", path.display())));
    let elsewhere = built(r#"{"build": {"dockerfile": "/etc/hostname", "context": "app"}}"#);
    assert!(elsewhere.unwrap_err().starts_with("/etc/hostname is not inside"));
    assert!(built(r#"{"build": {"dockerfile": "none"}}"#).unwrap_err().contains("none cannot be used"));
    std::fs::write(path.join("Dockerfile"), "FROM scratch").unwrap();
    assert_eq!(Image::of(&path, None, &nothing), Ok(Image::Built(BuildFrom::default())));
}

#[test]
fn the_container_is_named_after_its_folder() {
    let name = |path: &str| name_of(Path::new(path)).map(|name| name.to_string());
    assert_eq!(name("/home/u/my shop"), Some("my-shop".to_owned()));
    assert_eq!(name("/"), None);
    assert_eq!(name(&format!("/{}", "x".repeat(255))).unwrap().len(), 128);
}
