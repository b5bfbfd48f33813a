use super::*;
use std::collections::VecDeque;

/// Hands that write down what they do. What comes of running is given beforehand.
#[derive(Default)]
struct Fake {
    done: Vec<String>,
    runs: VecDeque<Result<(), NotRunning<&'static str>>>,
    registers: VecDeque<Result<(), &'static str>>,
}

impl Hands for Fake {
    type Error = &'static str;

    fn port(&mut self, preferred: Option<NonZeroU16>) -> Result<NonZeroU16, &'static str> {
        Ok(preferred.unwrap_or(NonZeroU16::new(20_000).unwrap()))
    }

    fn tokens(&mut self) -> Result<Tokens, &'static str> {
        let number = self.done.len();
        let token = |what: &str| Token::new(&format!("{what}{number}")).unwrap();
        Ok(Tokens { restart: token("r"), broker: token("b") })
    }

    fn register(&mut self, port: NonZeroU16, tokens: &Tokens) -> Result<(), &'static str> {
        self.done.push(format!("register {port} {} {}", tokens.restart.reveal(), tokens.broker.reveal()));
        self.registers.pop_front().unwrap_or(Ok(()))
    }

    fn deregister(&mut self) {
        self.done.push("deregister".to_owned());
    }

    async fn run(&mut self, port: NonZeroU16, tokens: &Tokens) -> Result<(), NotRunning<&'static str>> {
        self.done.push(format!("run {port} {} {}", tokens.restart.reveal(), tokens.broker.reveal()));
        self.runs.pop_front().unwrap_or(Ok(()))
    }
}

fn preferred() -> Option<NonZeroU16> {
    NonZeroU16::new(18_973)
}

#[tokio::test]
async fn the_daemon_knows_a_container_before_it_runs() {
    let mut hands = Fake::default();
    assert_eq!(start(&mut hands, preferred()).await, Ok(preferred().unwrap()));
    assert_eq!(hands.done, ["register 18973 r0 b0", "run 18973 r0 b0"]);
}

#[tokio::test]
async fn a_port_that_was_taken_costs_one_more_round_with_other_tokens() {
    let mut hands = Fake { runs: [Err(NotRunning::PortTaken("taken"))].into(), ..Fake::default() };
    assert_eq!(start(&mut hands, preferred()).await.unwrap().get(), 20_000);
    let done = ["register 18973 r0 b0", "run 18973 r0 b0", "register 20000 r2 b2", "run 20000 r2 b2"];
    assert_eq!(hands.done, done);
    let mut hands = Fake {
        runs: [Err(NotRunning::PortTaken("taken")), Err(NotRunning::PortTaken("again"))].into(),
        ..Fake::default()
    };
    assert_eq!(start(&mut hands, preferred()).await, Err("again"));
    assert_eq!(hands.done.len(), 5);
    assert_eq!(hands.done.last().unwrap(), "deregister");
}

#[tokio::test]
async fn whatever_fails_after_registering_undoes_it() {
    let mut hands = Fake { runs: [Err(NotRunning::Because("ended"))].into(), ..Fake::default() };
    assert_eq!(start(&mut hands, None).await, Err("ended"));
    assert_eq!(hands.done, ["register 20000 r0 b0", "run 20000 r0 b0", "deregister"]);
    let mut hands = Fake { registers: [Err("no")].into(), ..Fake::default() };
    assert_eq!(start(&mut hands, None).await, Err("no"));
    assert_eq!(hands.done.len(), 1);
    let mut hands = Fake {
        runs: [Err(NotRunning::PortTaken("taken"))].into(),
        registers: [Ok(()), Err("no")].into(),
        ..Fake::default()
    };
    assert_eq!(start(&mut hands, None).await, Err("no"));
    assert_eq!(hands.done.last().unwrap(), "deregister");
}

#[test]
fn a_container_has_its_variables_under_both_names_and_nothing_else_of_its_tokens() {
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
    let made = recipe.container(NonZeroU16::new(20_000).unwrap(), &tokens);
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
fn the_image_is_what_is_named_or_said_or_the_folders_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    let said = |text: &str| {
        std::fs::write(path.join(".devcontainer.json"), text).unwrap();
        Devcontainer::read(&path).unwrap().unwrap().devcontainer
    };
    let nothing = Devcontainer::default();
    let named = |image: &str| Ok(Image::Named(image.to_owned()));
    assert_eq!(Image::of(&path, Some("one"), &said(r#"{"image": "two"}"#)), named("one"));
    assert_eq!(Image::of(&path, None, &said(r#"{"image": "two"}"#)), named("two"));
    assert!(Image::of(&path, None, &nothing).unwrap_err().starts_with("nothing says what"));
    std::fs::create_dir(path.join("app")).unwrap();
    std::fs::write(path.join("app/D"), "FROM scratch").unwrap();
    let built = |text: &str| Image::of(&path, None, &said(text));
    let from = BuildFrom { context: "app".into(), dockerfile: "D".into() };
    let ok = built(r#"{"build": {"dockerfile": "app/../app/D", "context": "./app"}}"#);
    assert_eq!(ok, Ok(Image::Built(from)));
    let outside = built(r#"{"build": {"dockerfile": "app/D", "context": ".."}}"#);
    assert!(outside.unwrap_err().ends_with(&format!("does not lie in {}", path.display())));
    let elsewhere = built(r#"{"build": {"dockerfile": "/etc/hostname", "context": "app"}}"#);
    assert!(elsewhere.unwrap_err().starts_with("/etc/hostname does not lie in"));
    assert!(built(r#"{"build": {"dockerfile": "none"}}"#).unwrap_err().contains("none cannot be used"));
    std::fs::write(path.join("Dockerfile"), "FROM scratch").unwrap();
    assert_eq!(Image::of(&path, None, &nothing), Ok(Image::Built(BuildFrom::default())));
}

#[test]
fn a_folder_gives_its_container_its_name() {
    let name = |path: &str| name_of(Path::new(path)).map(|name| name.to_string());
    assert_eq!(name("/home/u/my shop"), Some("my-shop".to_owned()));
    assert_eq!(name("/"), None);
    assert_eq!(name(&format!("/{}", "x".repeat(255))).unwrap().len(), 128);
}
