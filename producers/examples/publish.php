<?php

// Publishes one draw straight to the broker, the way a PHP frontend can: contract v1, or v2 with a client nonce.
//
//     TOMBOLA_BROKER_URL=redis://host:6379/0 php publish.php ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]
//     TOMBOLA_BROKER_URL=amqp://user:password@host// php publish.php ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]
//     php publish.php --print ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]      shows the body and sends nothing
//
// Copy what is above the line "Command line". It opens a connection per draw, which is plain and slow: a long-running
// process keeps one open and publishes all its draws on it.

declare(strict_types=1);

use PhpAmqpLib\Connection\AMQPConnectionConfig;
use PhpAmqpLib\Connection\AMQPConnectionFactory;
use PhpAmqpLib\Exception\AMQPProtocolChannelException;
use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

const QUEUE = 'draws'; // the Stream, the exchange, the queue and the routing key: all have this name
const CONNECT_TIMEOUT_S = 5;
const CONFIRM_TIMEOUT_S = 10;
const NO_QUEUE = 'there is no queue `draws` on this broker yet: start a worker first';

/** A new request key, lottery_req_{timestamp ms}_{8 hex}_{3-digit seq}. It begins with the time: that keeps the
 *  ledger's unique index quick. */
function makeRequestKey(): string
{
    static $sequence = null; // at random first: with php-fpm, most requests make one key only
    $sequence = (($sequence ?? random_int(0, 999)) + 1) % 1000;
    return sprintf('lottery_req_%d_%s_%03d', microtime(true) * 1000, bin2hex(random_bytes(4)), $sequence);
}

/** The body of a draw. `$more` may hold lottery_session_id, campaign and client_nonce: random text that the player's
 *  browser made with the key, on which the outcome depends.
 *  What the contract refuses is refused here, where the caller hears of it: a worker can only park it. */
function makeBody(string $requestKey, int $accountId, array $more = []): string
{
    if (!preg_match('/^[A-Za-z0-9._-]{1,64}$/D', $requestKey)) { // D: or $ would let a final newline pass
        throw new InvalidArgumentException('a request key is 1 to 64 characters of A-Z a-z 0-9 . _ and -');
    }
    if ($accountId < 1) {
        throw new InvalidArgumentException('an account id is a positive integer');
    }
    $nonce = $more['client_nonce'] ?? null;
    if ($nonce !== null && !preg_match('/^[A-Za-z0-9_-]{16,64}$/D', $nonce)) {
        throw new InvalidArgumentException('a client nonce is 16 to 64 characters of A-Z a-z 0-9 _ and -');
    }
    $named = ['request_key' => $requestKey, 'lottery_session_id' => $more['lottery_session_id'] ?? $requestKey];
    $account = ['account_id' => $accountId];
    $campaign = ['campaign' => $more['campaign'] ?? 'default'];
    // The canonical forms, which are what a signature covers: no blanks, all fields, in this order.
    $draw = $nonce === null
        ? ['v' => 1] + $named + $account + $campaign
        : ['v' => 2, 'kind' => 'draw'] + $account + $named + $campaign + ['client_nonce' => $nonce];
    return json_encode($draw, JSON_THROW_ON_ERROR);
}

/** The signature of a canonical body under TOMBOLA_MESSAGE_SECRET (hex digits; of several, with commas, the first). */
function sign(string $body, string $secret): string
{
    return hash_hmac('sha256', $body, hex2bin(trim(explode(',', $secret)[0])));
}

/** Publish a body, signed if there is a secret; returns when the broker has confirmed it. When it throws, the broker
 *  may have the draw or not: publish the same body again, with the same request key. A second copy does no harm. */
function publish(string $url, string $body, string $secret = ''): void
{
    $parts = parse_url($url) ?: [];
    $beside = $secret !== '' ? ['signature' => sign($body, $secret)] : [];
    match ($parts['scheme'] ?? '') {
        'redis', 'rediss' => publishToRedis($parts, $body, $beside),
        'amqp', 'amqps' => publishToRabbitMQ($parts, $body, $beside),
        default => throw new InvalidArgumentException('a broker URL begins with redis:// or amqp://'),
    };
}

function publishToRedis(array $parts, string $body, array $beside): void
{
    if (!extension_loaded('redis')) {
        throw new RuntimeException('the PHP extension redis is not installed');
    }
    $redis = new Redis();
    $host = ($parts['scheme'] === 'rediss' ? 'tls://' : '') . $parts['host'];
    $redis->connect($host, $parts['port'] ?? 6379, CONNECT_TIMEOUT_S, null, 0, CONFIRM_TIMEOUT_S);
    [$user, $password] = login($parts);
    if ($password !== '') {
        $redis->auth($user !== '' ? [$user, $password] : $password);
    }
    $database = (int) ltrim($parts['path'] ?? '', '/');
    // XADD makes the Stream if need be. The workers make their group, from its first entry: none is skipped.
    if (!$redis->select($database) || !$redis->xAdd(QUEUE, '*', ['body' => $body] + $beside)) {
        throw new RuntimeException($redis->getLastError() ?? 'Redis did not take it'); // phpredis returns false
    }
}

function publishToRabbitMQ(array $parts, string $body, array $beside): void
{
    // By Composer, or Debian's package php-amqplib, which is found on the include path.
    $composer = __DIR__ . '/vendor/autoload.php';
    require_once is_file($composer) ? $composer : 'PhpAmqpLib/autoload.php';

    [$user, $password] = login($parts, 'guest', 'guest');
    $vhost = rawurldecode(substr($parts['path'] ?? '', 1));
    $config = new AMQPConnectionConfig();
    $config->setHost($parts['host']);
    $config->setIsSecure($parts['scheme'] === 'amqps');
    $config->setPort($parts['port'] ?? ($parts['scheme'] === 'amqps' ? 5671 : 5672));
    $config->setUser($user);
    $config->setPassword($password);
    $config->setVhost($vhost !== '' ? $vhost : '/');
    $config->setConnectionTimeout(CONNECT_TIMEOUT_S);
    $config->setReadTimeout(CONFIRM_TIMEOUT_S);
    $config->setWriteTimeout(CONFIRM_TIMEOUT_S);
    $config->setChannelRPCTimeout(CONFIRM_TIMEOUT_S);
    $connection = AMQPConnectionFactory::create($config);

    $channel = $connection->channel();
    $channel->confirm_select();
    $problem = null;
    $channel->set_return_listener(function () use (&$problem): void {
        $problem = NO_QUEUE;
    });
    $channel->set_nack_handler(function () use (&$problem): void {
        $problem = 'RabbitMQ refused it: the queue is full, or cannot replicate';
    });
    $message = new AMQPMessage($body, [
        'content_type' => 'application/json',
        'content_encoding' => 'utf-8',
        'delivery_mode' => AMQPMessage::DELIVERY_MODE_PERSISTENT,
        'application_headers' => new AMQPTable($beside),
    ]);
    // Nothing is declared here: RabbitMQ refuses a declaration whose arguments differ in a letter from the workers'
    // (producers/brokers/streams.py), so it is left to them. Where they have not been yet, the broker says so: without the
    // exchange it closes the channel, and `mandatory` makes it return what finds no queue. (The confirm alone would
    // not do: a message that no queue wants is confirmed as well, right after its return.)
    try {
        $channel->basic_publish($message, QUEUE, QUEUE, mandatory: true);
        $channel->wait_for_pending_acks_returns(CONFIRM_TIMEOUT_S);
    } catch (AMQPProtocolChannelException $error) {
        throw $error->getCode() === 404 ? new RuntimeException(NO_QUEUE) : $error;
    }
    if ($problem !== null) {
        throw new RuntimeException($problem);
    }
    $connection->close();
}

/** User and password of a URL. */
function login(array $parts, string $user = '', string $password = ''): array
{
    return [rawurldecode($parts['user'] ?? $user), rawurldecode($parts['pass'] ?? $password)];
}

// Command line.

function main(array $arguments): void
{
    $printOnly = ($arguments[0] ?? '') === '--print';
    if ($printOnly) {
        array_shift($arguments);
    }
    $url = (string) getenv('TOMBOLA_BROKER_URL');
    $count = count($arguments);
    if ($count < 1 || $count > 3 || ($url === '' && !$printOnly)) {
        throw new InvalidArgumentException(
            'usage: TOMBOLA_BROKER_URL=redis://... (or amqp://...) php publish.php ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]'
        );
    }
    $accountId = filter_var($arguments[0], FILTER_VALIDATE_INT); // false for what does not fit 64 bits, too
    $requestKey = $arguments[1] ?? makeRequestKey();
    $body = makeBody($requestKey, $accountId === false ? 0 : $accountId, ['client_nonce' => $arguments[2] ?? null]);
    if ($printOnly) {
        echo $body, "\n";
        return;
    }
    // First the key, then the draw: whoever dies in between can send the same again. A frontend saves it here.
    echo $requestKey, "\n";
    publish($url, $body, (string) getenv('TOMBOLA_MESSAGE_SECRET'));
    echo "confirmed: the broker has the draw\n";
}

if (realpath($_SERVER['SCRIPT_FILENAME'] ?? '') === __FILE__) {
    // Warnings are errors, too; those that a library silences with @ are its own business.
    set_error_handler(function (int $level, string $message): bool {
        return (error_reporting() & $level) !== 0 && throw new ErrorException($message);
    });
    try {
        main(array_slice($argv, 1));
    } catch (Throwable $error) {
        fwrite(STDERR, 'not published: ' . strtok($error->getMessage(), "\n") . "\n");
        exit(1);
    }
}
